"""Letter N: what train says of its own memory before it begins."""

from types import SimpleNamespace

import pytest

from tests.planning.planned_run import model, planned
from tests.planning.real_run import Work
from tests.planning.test_out_of_memory import training

RUN = Work(model(), "--bf16 --micro-batch-size 4 --global-batch-size 64", 8)


@pytest.fixture
def inputs():
    return training(planned(RUN))


def device(name, megabytes):
    return SimpleNamespace(name=name, memory=lambda: SimpleNamespace(total=megabytes))


def test_letter_n_a_run_that_fits(inputs):
    from mindspeed_mm.trainer.plan_verdict import verdict

    inputs.platform = device("cuda", 2**16)
    fits, text = verdict(inputs)
    assert fits and text.startswith("plan: the run fits, 0.")
    assert "rows of 192 tokens" in text and "61.85 GB can be used" in text and "host memory" in text


def test_letter_n_a_run_that_does_not_fit_is_told_the_cheapest_changes(inputs):
    from mindspeed_mm.trainer.plan_verdict import verdict

    inputs.platform = device("cuda", 8)
    fits, text = verdict(inputs)
    assert not fits and "WILL NOT FIT" in text
    assert all(f"\n  {number}. " in text for number in (1, 2, 3))
    inputs.args.micro_batch_size, inputs.args.num_micro_batches = 1, 1
    inputs.args.data_parallel_size = 1
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    inputs.spec = planned(Work(model(**full), "--bf16")).spec
    assert "no single change of the layout" in verdict(inputs)[1]


def test_letter_n_ranks_of_one_host_share_its_memory(inputs, monkeypatch):
    from mindspeed_mm.trainer.plan_verdict import verdict

    inputs.platform = device("cpu", 2**16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert "15.46 GB can be used" in verdict(inputs)[1]
