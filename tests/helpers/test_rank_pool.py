import time

import pytest
import torch

from tests.helpers.pool import RankError


def total(value):
    tensor = torch.tensor([float(value + torch.distributed.get_rank())])
    torch.distributed.all_reduce(tensor)
    return tensor.item()


def fail_on_rank_1():
    if torch.distributed.get_rank() == 1:
        raise KeyError("only here")
    return total(0)


def hang():
    time.sleep(60)


def test_runs_a_collective_on_every_rank(ranks):
    assert ranks(2).run(total, 10) == [21.0, 21.0]
    assert ranks(2).run(total, 1) == [3.0, 3.0]


def test_shows_the_remote_traceback_and_goes_on(ranks):
    with pytest.raises(RankError, match="rank 1(.|\n)*only here"):
        ranks(2).run(fail_on_rank_1)
    assert ranks(2).run(total, 0) == [1.0, 1.0]


def test_kills_a_hanging_rank(ranks):
    with pytest.raises(RankError, match="did not answer and were killed"):
        ranks(2).run(hang, timeout=0.5)
