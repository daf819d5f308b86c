"""Learning rates by epoch, as LAVIS and MiniGPT-4 have them (minigpt4/common/optims.py), beside megatron.core's."""

from __future__ import annotations

import math
from typing import Any

from megatron.driver.schedule_flags import WARMUP_COSINE, WARMUP_STEP
from mindspeed_mm.platform.core_optimizer import Scheduler


class EpochScheduler(Scheduler):
    """linear_warmup_cosine_lr and linear_warmup_step_lr, for one step at a time.

    Letters: t the step from 0 on, E steps of an epoch, e = t // E, W warm-up steps, T steps of the whole decay; a the
    learning rate at the beginning of the warm-up, b the highest and c the lowest one.

    The warm-up is min(b, a + (b - a) * t / max(W, 1)) while t < W. Behind it the first has
    c + (b - c) / 2 * (1 + cos(pi * t / T)), whose cosine is counted from step 0, so that it begins below b. The second
    warms up in the whole first epoch (which stays at b where W is short), and has max(c, b * rate ** e) then.

    `in_epoch`: the warm-up counts t - e * E instead of t, as LAVIS wrote it: it begins anew with each epoch that it
    reaches into, and linear_warmup_step_lr ends it with the first one.
    """

    def __init__(self, optimizer: Any, *, epoch_steps: int, decay_rate: float, in_epoch: bool, **settings: Any) -> None:
        self.epoch_steps, self.decay_rate, self.in_epoch = epoch_steps, decay_rate, in_epoch
        warmup = settings.pop("lr_warmup_steps")
        # megatron.core refuses a warm-up as long as the decay, which the original allows.
        super().__init__(optimizer, lr_warmup_steps=0, **settings)
        self.lr_warmup_steps = warmup
        self.step(0)

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """The learning rate of a group at the present step. A group with a highest one of its own keeps the ratio."""
        highest, lowest = param_group.get("max_lr", self.max_lr), param_group.get("min_lr", self.min_lr)
        first = self.init_lr * (highest / self.max_lr if self.max_lr else 1.0)
        epoch = self.num_steps // self.epoch_steps
        if self._warms_up(epoch):
            counted = self.num_steps % self.epoch_steps if self.in_epoch else self.num_steps
            return min(highest, first + (highest - first) * counted / max(self.lr_warmup_steps, 1))
        if self.lr_decay_style == WARMUP_STEP:
            return max(lowest, highest * self.decay_rate**epoch)
        part = min(self.num_steps / self.lr_decay_steps, 1.0)
        return lowest + (highest - lowest) * 0.5 * (1.0 + math.cos(math.pi * part))

    def _warms_up(self, epoch: int) -> bool:
        if self.lr_decay_style == WARMUP_COSINE:
            return self.num_steps < self.lr_warmup_steps
        return epoch == 0 or (self.num_steps < self.lr_warmup_steps and not self.in_epoch)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, and a resumed run compares."""
        own = ("epoch_steps", "decay_rate", "in_epoch", "init_lr")
        return super().state_dict() | {name: getattr(self, name) for name in own}
