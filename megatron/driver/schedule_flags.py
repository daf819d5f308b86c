"""Flags of the learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.driver.flags import flag, switch

WARMUP_COSINE, WARMUP_STEP = "linear_warmup_cosine_lr", "linear_warmup_step_lr"
"""LAVIS's and MiniGPT-4's schedules, by the names of their registry."""

BY_EPOCHS = (WARMUP_COSINE, WARMUP_STEP)
"""Styles that count epochs of --iters-per-epoch steps."""


@dataclass(frozen=True, kw_only=True)
class ScheduleArguments:
    """The part of DriverArguments that says how the learning rate moves."""

    lr: float | None = flag(float, None, "optimizer", "highest learning rate")
    min_lr: float = flag(float, 0.0, "optimizer", "learning rate at the end of the decay")
    train_iters: int | None = flag(int, None, "optimizer", "steps of the whole run")
    lr_decay_style: str = flag(
        str, "linear", "optimizer", "shape of the decay", ("cosine", "linear", "constant", *BY_EPOCHS)
    )
    lr_decay_iters: int | None = flag(int, None, "optimizer", "steps until --min-lr; default --train-iters")
    lr_decay_rate: float = flag(
        float, 1.0, "optimizer", f"factor of the learning rate after each epoch; of {WARMUP_STEP}"
    )
    iters_per_epoch: int | None = flag(int, None, "optimizer", f"steps of an epoch; of {' and '.join(BY_EPOCHS)}")
    lr_warmup_fraction: float | None = flag(
        float, None, "optimizer", "share of the decay steps that warm up, rounded up"
    )
    lr_warmup_iters: int = flag(int, 0, "optimizer", "steps that warm up")
    lr_warmup_init: float = flag(float, 0.0, "optimizer", "learning rate at the beginning of the warm-up")
    lr_warmup_in_epoch: bool = switch(
        "optimizer", f"count the warm-up within each epoch, as LAVIS wrote {' and '.join(BY_EPOCHS)}"
    )

    @property
    def decay_steps(self) -> int:
        """Steps after which the learning rate stays at min_lr."""
        return self.train_iters if self.lr_decay_iters is None else self.lr_decay_iters

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up: ceil(fraction x decay steps), as HF's Trainer and the original LLaVA count them."""
        if self.lr_warmup_fraction is None:
            return self.lr_warmup_iters
        return math.ceil(self.lr_warmup_fraction * self.decay_steps)
