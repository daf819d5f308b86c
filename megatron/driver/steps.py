"""What is known of a training step, and the speeds that follow from several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron.driver.arguments import DriverArguments
from megatron.driver.state import TrainState, compute_dtype

TERAFLOPS, MFU = "throughput per GPU (TFLOP/s/GPU)", "MFU (%)"


@dataclass(frozen=True)
class StepMetrics:
    """One training step over all ranks."""

    loss: float
    """Sum of token losses of the global batch / its supervised tokens."""
    supervised: int
    samples: int
    tokens: int
    positions: int
    flops: float
    data_seconds: float
    """Time that a data-parallel rank waited for its batches, on average."""
    seconds: float
    learning_rate: float
    """The rate that this step used."""
    loss_scale: float
    grad_norm: float | None
    """L2 norm before clipping; None where the step was skipped for overflow."""

    means: dict[str, float] = field(default_factory=dict)
    """What else is logged (Hooks.metrics), by its key."""
    loss_name: str = "lm loss"
    part_norms: dict[str, float | None] = field(default_factory=dict)
    """L2 norms of the gradients of each part that trains, before clipping, by their keys; None as grad_norm."""

    @property
    def record(self) -> dict[str, float | None]:
        """All figures by their keys; those that are no number, for want of anything to average, are None."""
        own = {name: value for name, value in vars(self).items() if name not in ("means", "loss_name", "part_norms")}
        return (
            own | self.part_norms | {name: None if math.isnan(value) else value for name, value in self.means.items()}
        )

    @property
    def skipped(self) -> bool:
        return self.grad_norm is None


def mean_figures(steps: Sequence[StepMetrics]) -> dict[str, float]:
    """Means of what else is logged, over the steps."""
    return {name: sum(step.means[name] for step in steps) / len(steps) for name in steps[-1].means}


def mean_loss(steps: Sequence[StepMetrics]) -> float:
    """Mean of the steps' losses."""
    return sum(step.loss for step in steps) / len(steps)


def rates(steps: Sequence[StepMetrics], state: TrainState, args: DriverArguments) -> dict[str, float]:
    """Speeds and shares over some steps; TFLOP/s where operations are counted, MFU where the device's peak is known."""
    seconds = sum(step.seconds for step in steps)
    positions = sum(step.positions for step in steps)
    values = {
        "samples/s": sum(step.samples for step in steps) / seconds,
        "tokens/s": sum(step.tokens for step in steps) / seconds,
        "data wait (%)": 100 * sum(step.data_seconds for step in steps) / seconds,
        "padding (%)": 100 * (1 - sum(step.tokens for step in steps) / positions) if positions else 0.0,
    }
    flops = sum(step.flops for step in steps) / seconds / args.world_size
    if flops:
        values[TERAFLOPS] = flops / 1e12
        peak = state.platform.peak_flops(compute_dtype(args))
        if peak is not None:
            values[MFU] = 100 * flops / peak
    return values
