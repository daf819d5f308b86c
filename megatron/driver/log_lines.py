"""The figures of some training steps as text: the short form, and Megatron's line."""

from __future__ import annotations

import datetime
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from megatron.driver.arguments import DriverArguments
from megatron.driver.state import TrainState
from megatron.driver.steps import MFU, TERAFLOPS, StepMetrics, mean_figures, mean_loss, rates

RECENT = 1000
"""Steps from which the time left is judged."""


class Figure(NamedTuple):
    """One figure: alone in a column, or in words in a line."""

    heading: str
    value: str
    words: str


class Pace:
    """How long a step takes, with saves and validations between steps."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=RECENT)

    def count(self) -> None:
        """A step has just ended."""
        self._ends.append(self._clock())

    def left(self, steps: int) -> float | None:
        """Seconds that further steps will take. None after the first step, which is slower than all others."""
        if len(self._ends) < 2:
            return None
        return steps * (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)


def figures(
    state: TrainState, args: DriverArguments, steps: Sequence[StepMetrics], memory: float, left: float | None
) -> list[Figure]:
    """What the short forms show of the steps since they last did.

    Learning rate, gradient norm and loss scale are the last step's. The loss is the mean of the steps. TFLOP/s are
    there where the device's peak is known, the loss scale with --fp16.

    Args:
        memory: MiB of the fullest rank, at its peak.
        left: seconds until the last step, where that is known.
    """
    last, speed = steps[-1], rates(steps, state, args)
    seconds = sum(step.seconds for step in steps) / len(steps)
    found = [
        _named("loss", f"{mean_loss(steps):#.4g}"),
        _named("lr", f"{last.learning_rate:.2e}"),
        _named("grad norm", "skipped" if last.grad_norm is None else f"{last.grad_norm:.3g}"),
    ]
    found += [Figure("", "", f"{name} {value:.4g}") for name, value in mean_figures(steps).items()]
    if args.fp16:
        found.append(_named("loss scale", f"{last.loss_scale:.0f}"))
    skipped = sum(step.skipped for step in steps)
    if skipped:
        found.append(Figure("", "", f"{skipped} of {len(steps)} steps skipped, gradients overflowed"))
    found += [_measured(compact(speed[unit]), unit) for unit in ("samples/s", "tokens/s")]
    if MFU in speed:
        flops, share = f"{speed[TERAFLOPS]:.3g}", f"{speed[MFU]:.0f} %"
        found += [Figure("TFLOP/s", flops, f"{flops} TFLOP/s ({share} of the peak)"), Figure("of peak", share, "")]
    found += [
        _named("memory", f"{memory * 2**20 / 1e9:.3g} GB"),
        _named("data wait", f"{speed['data wait (%)']:.1f} %"),
        _named("padding", f"{speed['padding (%)']:.0f} %"),
        Figure("step time", f"{seconds:.3g} s", f"{seconds:.3g} s a step"),
    ]
    if left is not None:
        found.append(Figure("", "", f"{duration(left)} left"))
    return found


def _named(heading: str, value: str) -> Figure:
    return Figure(heading, value, f"{heading} {value}")


def _measured(value: str, unit: str) -> Figure:
    return Figure(unit, value, f"{value} {unit}")


def compact(value: float) -> str:
    """Three digits and a power of a thousand: 28700 -> 28.7k."""
    for power, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * power:
            return f"{value / power:.3g}{letter}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Two units: 3725 -> 1 h 02 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def place(state: TrainState, args: DriverArguments) -> str:
    """The step and how many there will be, equally wide in every line."""
    total = str(args.train_iters)
    return f"step {state.iteration:{len(total)}d}/{total}"


def short_line(place_of_step: str, shown: Sequence[Figure]) -> str:
    """One line of figures."""
    return " | ".join([place_of_step, *(figure.words for figure in shown if figure.words)])


def megatron_line(state: TrainState, args: DriverArguments, steps: Sequence[StepMetrics]) -> str:
    """Megatron's line (training_log of Megatron-LM core_r0.8.0) over the steps since the last one, and what we add.

    The learning rate and the gradient norm are the last step's; the loss is the mean of the steps.
    """
    last = steps[-1]
    speed = rates(steps, state, args)
    clock = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    parts = [
        f"[{clock}] iteration {state.iteration:8d}/{args.train_iters:8d}",
        f"consumed samples: {state.consumed_samples:12d}",
        f"elapsed time per iteration (ms): {1000 * sum(step.seconds for step in steps) / len(steps):.1f}",
    ]
    flops = speed.pop(TERAFLOPS, None)
    if flops is not None:
        parts.append(f"{TERAFLOPS}: {flops:#.3g}")
    parts += [
        f"learning rate: {last.learning_rate:.6E}",
        f"global batch size: {args.global_batch_size:5d}",
        f"{last.loss_name}: {mean_loss(steps):.6E}",
        f"loss scale: {last.loss_scale:.1f}",
        f"grad norm: {'skipped' if last.grad_norm is None else format(last.grad_norm, '.3f')}",
        f"number of skipped iterations: {sum(step.skipped for step in steps):3d}",
        "number of nan iterations:   0",  # a step that is not a number stops the run
        *(f"{name}: {value:.1f}" for name, value in speed.items()),
        *(f"{name}: {value:.4f}" for name, value in mean_figures(steps).items()),
    ]
    return " | ".join(parts) + " |"


def validation_line(
    state: TrainState,
    args: DriverArguments,
    loss: float,
    perplexity: float | None,
    samples: int,
    loss_name: str = "lm loss",
    what: str = "validation loss",
) -> str:
    """The loss on the validation set, in the form that --log-format asks for; perplexity where the loss has one."""
    if args.log_format == "megatron":
        told = "" if perplexity is None else f" | {loss_name} PPL: {perplexity:.6E}"
        start = f"{what} at iteration {state.iteration} | {loss_name} value: {loss:.6E}"
        return f"{start}{told} | samples: {samples} |"
    told = "" if perplexity is None else f" | perplexity {perplexity:.4g}"
    return f"{place(state, args)} | {what} {loss:#.4g}{told} | {samples} samples"
