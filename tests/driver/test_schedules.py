"""linear_warmup_cosine_lr and linear_warmup_step_lr against the formulas as they are published."""

import math
from types import SimpleNamespace

import pytest

from megatron.driver.schedules import EpochScheduler
from mindspeed_mm.errors import CheckpointError
from tests.driver.test_driver_resume import run, tiny

EPOCH, EPOCHS, START, HIGH, LOW = 5, 4, 0.001, 0.01, 0.004
COSINE, STEP = "linear_warmup_cosine_lr", "linear_warmup_step_lr"


def published(style, warmup, rate, within):
    """The learning rate of each step: epoch by epoch, as the original calls its schedule."""
    rates = []
    for epoch in range(EPOCHS):
        for step in range(EPOCH):
            total = epoch * EPOCH + step
            warm = min(HIGH, START + (HIGH - START) * (step if within else total) / max(warmup, 1))
            if style == COSINE:
                fallen = (HIGH - LOW) * 0.5 * (1.0 + math.cos(math.pi * total / (EPOCHS * EPOCH))) + LOW
                rates.append(warm if total < warmup else fallen)
            else:
                fallen = max(LOW, HIGH * rate**epoch)
                rates.append(warm if epoch == 0 or (total < warmup and not within) else fallen)
    return rates


def scheduler(style, warmup, rate=0.7, within=False, groups=None):
    settings = {"init_lr": START, "max_lr": HIGH, "min_lr": LOW, "lr_warmup_steps": warmup, "lr_decay_style": style}
    settings |= {"lr_decay_steps": EPOCH * EPOCHS, "start_wd": 0.0, "end_wd": 0.0, "wd_incr_style": "constant"}
    optimizer = SimpleNamespace(param_groups=groups or [{}])
    own = {"epoch_steps": EPOCH, "decay_rate": rate, "in_epoch": within}
    return EpochScheduler(optimizer, wd_incr_steps=1, **own, **settings)


@pytest.mark.parametrize("style", [COSINE, STEP])
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("warmup", [0, 3, 5, 8, 40])
def test_as_published(style, warmup, within):
    made, found = scheduler(style, warmup, within=within), []
    for _ in range(EPOCH * EPOCHS):
        found.append(made.optimizer.param_groups[0]["lr"])
        made.step(1)
    assert found == pytest.approx(published(style, warmup, 0.7, within), rel=1e-12)


def test_known_values():
    """The cosine is counted from step 0: it is below the highest one when the warm-up ends. A warm-up over epochs
    begins anew where it is counted within them."""
    made = scheduler(COSINE, 5)
    made.step(5)
    assert made.optimizer.param_groups[0]["lr"] == pytest.approx(LOW + (HIGH - LOW) * (1 + math.sqrt(0.5)) / 2)
    for within, wanted in ((True, START), (False, START + (HIGH - START) * 5 / 8)):
        made = scheduler(COSINE, 8, within=within)
        made.step(5)
        assert made.optimizer.param_groups[0]["lr"] == pytest.approx(wanted)


def test_groups_keep_their_ratio():
    made = scheduler(STEP, 3, groups=[{}, {"max_lr": 2 * HIGH, "min_lr": 2 * LOW}])
    for _ in range(EPOCH * EPOCHS):
        first, second = (group["lr"] for group in made.optimizer.param_groups)
        assert second == pytest.approx(2 * first)
        made.step(1)


def test_runs_and_resumes(tmp_path):
    """The log's learning rates, over a resume in the middle of an epoch."""
    flags = ["--save", tmp_path, "--lr-decay-style", COSINE, "--iters-per-epoch", "3", "--lr-warmup-iters", "2"]
    flags += ["--lr-warmup-init", "0.002", "--min-lr", "0.001", "--lr-decay-iters", "9"]
    run(*flags, train_iters=4)
    run(*flags, "--load", tmp_path, train_iters=9)
    found = [record["learning_rate"] for record in tiny.records(tmp_path)]
    fallen = [0.001 + 0.009 * 0.5 * (1 + math.cos(math.pi * step / 9)) for step in range(2, 9)]
    assert found == pytest.approx([0.002, 0.006, *fallen])
    with pytest.raises(CheckpointError, match="the checkpoint's schedule is linear_warmup_cosine_lr; expected"):
        run("--save", tmp_path, "--load", tmp_path, "--use-checkpoint-opt-param-scheduler", train_iters=10)
