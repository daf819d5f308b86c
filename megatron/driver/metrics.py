"""What a run tells about itself: Megatron's log line, SAVE/metrics.jsonl, TensorBoard."""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from megatron.driver.arguments import DriverArguments
from megatron.driver.initialize import is_rank_0
from megatron.driver.state import TrainState, compute_dtype

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


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

    @property
    def skipped(self) -> bool:
        return self.grad_norm is None

    @property
    def record(self) -> dict[str, float | None]:
        """All figures by their keys; those that are no number, for want of anything to average, are None."""
        own = {name: value for name, value in vars(self).items() if name != "means"}
        return own | {name: None if math.isnan(value) else value for name, value in self.means.items()}


class Recorder:
    """Writes the metrics of each step; does something on rank 0 only."""

    def __init__(self, state: TrainState, args: DriverArguments, loss_name: str = "lm loss") -> None:
        self._state, self._args, self._loss_name = state, args, loss_name
        self._window: list[StepMetrics] = []
        self._memory_shown = False
        self._file = self._board = None
        if not is_rank_0():
            return
        if args.save is not None:
            path = Path(args.save) / METRICS_FILE
            cut_records(path, state.iteration)
            self._file = path.open("a", encoding="utf-8")
        if args.tensorboard_dir is not None:
            self._board = SummaryWriter(args.tensorboard_dir, purge_step=state.iteration + 1)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def add(self, step: StepMetrics) -> None:
        """Record a step that has just been counted in the state."""
        if not is_rank_0():
            return
        self._window.append(step)
        self._write_record(step)
        if self._state.iteration % self._args.log_interval == 0:
            logger.info(log_line(self._state, self._args, self._window, self._loss_name))
            self._show_memory()
            self._window.clear()

    def flush(self) -> None:
        """Make the records of all steps so far durable; called before a checkpoint is written."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def _write_record(self, step: StepMetrics) -> None:
        iteration = self._state.iteration
        if self._file is not None:
            record = {"iteration": iteration, "consumed_samples": self._state.consumed_samples} | step.record
            self._file.write(json.dumps(record) + "\n")
        if self._board is not None:
            for name, value in {**step.record, **rates([step], self._state, self._args)}.items():
                if value is not None:
                    self._board.add_scalar(name, value, iteration)

    def _show_memory(self) -> None:
        if self._memory_shown:
            return
        self._memory_shown = True
        memory = self._state.platform.memory()
        logger.info(
            "[Rank 0] (after %d iterations) memory (MB) | allocated: %.1f | max allocated: %.1f | device: %.1f",
            *(self._state.iteration, memory.allocated, memory.peak, memory.total),
        )


def cut_records(path: Path, iteration: int) -> None:
    """Drop the records after `iteration`, and all from one on that a killed run left unfinished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            logger.warning("%s: the records after iteration %d are damaged and dropped", path, len(kept))
            break
        if not line.endswith("\n") or record["iteration"] > iteration:
            break
        kept.append(line)
    aside = path.with_name(path.name + ".new")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, path)


def rates(steps: list[StepMetrics], state: TrainState, args: DriverArguments) -> dict[str, float]:
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
        values["throughput per GPU (TFLOP/s/GPU)"] = flops / 1e12
        peak = state.platform.peak_flops(compute_dtype(args))
        if peak is not None:
            values["MFU (%)"] = 100 * flops / peak
    return values


def log_line(state: TrainState, args: DriverArguments, steps: list[StepMetrics], loss_name: str = "lm loss") -> str:
    """Megatron's line (training_log of Megatron-LM core_r0.8.0) over the steps since the last one, and what we add.

    The learning rate and the gradient norm are the last step's; the loss and what stands behind the speeds are means of
    the steps.
    """
    last = steps[-1]
    speed = rates(steps, state, args)
    clock = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    parts = [
        f"[{clock}] iteration {state.iteration:8d}/{args.train_iters:8d}",
        f"consumed samples: {state.consumed_samples:12d}",
        f"elapsed time per iteration (ms): {1000 * sum(step.seconds for step in steps) / len(steps):.1f}",
    ]
    flops = speed.pop("throughput per GPU (TFLOP/s/GPU)", None)
    if flops is not None:
        parts.append(f"throughput per GPU (TFLOP/s/GPU): {flops:#.3g}")
    parts += [
        f"learning rate: {last.learning_rate:.6E}",
        f"global batch size: {args.global_batch_size:5d}",
        f"{loss_name}: {sum(step.loss for step in steps) / len(steps):.6E}",
        f"loss scale: {last.loss_scale:.1f}",
        f"grad norm: {'skipped' if last.grad_norm is None else format(last.grad_norm, '.3f')}",
        f"number of skipped iterations: {sum(step.skipped for step in steps):3d}",
        "number of nan iterations:   0",  # a step that is not a number stops the run
        *(f"{name}: {value:.1f}" for name, value in speed.items()),
        *(f"{name}: {sum(step.means[name] for step in steps) / len(steps):.4f}" for name in last.means),
    ]
    return " | ".join(parts) + " |"
