"""Processes that prepare data and are ended from outside."""

import os
import signal
import time

import psutil
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mindspeed_mm.data import loader_workers
from mindspeed_mm.errors import DataError


def test_letter_j_a_killed_worker_is_told_where_batches_are_asked_for():
    """Not by an error out of nowhere, where the training is when the worker ends."""
    loader = DataLoader(torch.arange(9), num_workers=1, timeout=1, worker_init_fn=loader_workers.settle)
    before = _children()  # of other tests in this process, such as the pool of ranks
    batches = loader_workers.batches(loader)
    assert next(batches) == 0
    (worker,) = [child for child in _children() - before if _is_worker(child)]
    os.kill(worker, signal.SIGKILL)
    os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    with pytest.raises(DataError, match=rf"ended from outside \(.*{worker}.*lower --num-workers"):
        list(batches)


class OneThatHangs(Dataset):
    """The first record comes, the second never, as from a file system that does not answer."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return index if index == 0 else signal.pause()


def test_letter_j_workers_in_a_read_that_hangs_are_not_waited_for(monkeypatch):
    """torch waits up to 10 s for each of them."""
    monkeypatch.setattr(loader_workers, "ALLOWED_TO_END", 0.1)
    before, begin = _children(), time.monotonic()
    batches = loader_workers.batches(DataLoader(OneThatHangs(), num_workers=2, worker_init_fn=loader_workers.settle))
    assert next(batches) == 0
    batches.close()
    assert time.monotonic() - begin < 5 and _children() <= before


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def _is_worker(process: int) -> bool:
    return os.getpgid(process) == process  # what settle does
