"""When a device's memory is full: a snapshot of it, and the three cheapest remedies for this very run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from mindspeed_mm.errors import TrainingError
from mindspeed_mm.models.parallel import layout_problems
from mindspeed_mm.planning.duration import step_time
from mindspeed_mm.planning.hardware import known
from mindspeed_mm.planning.job import PlannedRow, TrainingJob
from mindspeed_mm.planning.memory import peak_memory
from mindspeed_mm.planning.planner import job_of
from mindspeed_mm.planning.search import REFERENCE, with_recompute
from mindspeed_mm.trainer.inputs import RunInputs

logger = logging.getLogger(__name__)

PHRASES = ("out of memory", "can't allocate memory", "not enough memory")
"""What allocators without an exception of their own say: torch's CPU allocator and torch_npu's."""
SHOWN = 3
ENOUGH = 0.95
"""A remedy leaves at most this share of the memory that the run needs."""


class Remedy(NamedTuple):
    """A change of the run that needs less memory."""

    text: str
    job: TrainingJob


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory is full."""
    return isinstance(error, torch.OutOfMemoryError) or any(phrase in str(error).lower() for phrase in PHRASES)


@contextlib.contextmanager
def explaining_out_of_memory(inputs: RunInputs) -> Iterator[None]:
    """Turns the error of a full memory into one that says what to do.

    Raises:
        TrainingError: memory is full; names the snapshot, where the device can write one, and the remedies.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(_message(inputs, error)) from error


def _message(inputs: RunInputs, error: RuntimeError) -> str:
    args = inputs.args
    row = longest_row(inputs)
    job = job_of(args, inputs.spec, row, inputs.platform.name)
    peak = peak_memory(job)
    lines = [
        f"the memory of {inputs.platform.name} is full: {str(error).splitlines()[0]}",
        *getattr(error, "__notes__", ()),
        f"this run is predicted to need {peak.peak / 1e9:.2f} GB on a rank with rows of {row.positions} tokens "
        f"(parameters {peak.parameters / 1e9:.2f}, gradients {peak.gradients / 1e9:.2f}, optimizer "
        f"{peak.optimizer / 1e9:.2f}, activations {peak.activations / 1e9:.2f})",
    ]
    snapshot = _snapshot(inputs)
    if snapshot is not None:
        lines.append(f"a snapshot of the memory is in {snapshot}")
    found = remedies(job)
    lines += [f"{number}. {described(remedy, job)}" for number, remedy in enumerate(found, 1)]
    if not found:
        lines.append("no change of the layout on these devices helps: take more devices, or shorter rows")
    return "\n  ".join(lines)


def remedies(job: TrainingJob) -> list[Remedy]:
    """The changes that save memory and cost least time, at most three, cheapest first."""
    peak = peak_memory(job).peak
    helping = [remedy for remedy in _changes(job) if peak_memory(remedy.job).peak <= ENOUGH * peak]
    return sorted(helping, key=lambda remedy: _seconds(remedy.job))[:SHOWN]


def _seconds(job: TrainingJob) -> float:
    """Time of a sample, by the ratios of the device that layouts are compared with."""
    return step_time(job, known()[REFERENCE]).total / job.global_batch_size


def described(remedy: Remedy, job: TrainingJob) -> str:
    """One line: the remedy, the memory that is left to need, and the time that it costs."""
    saved = peak_memory(remedy.job).peak
    slower = 100 * (_seconds(remedy.job) / _seconds(job) - 1)
    return f"{remedy.text}: {saved / 1e9:.2f} GB, {slower:+.0f} % time a sample"


def _changes(job: TrainingJob) -> Iterator[Remedy]:
    """Single changes of a run on the same devices with the same global batch."""
    if job.micro_batch_size % 2 == 0:
        half = replace(job, micro_batch_size=job.micro_batch_size // 2, num_micro_batches=2 * job.num_micro_batches)
        yield Remedy(f"--micro-batch-size {half.micro_batch_size}, the global batch stays", half)
    if not job.use_distributed_optimizer and job.sharing_ranks > 1:
        yield Remedy("--use-distributed-optimizer", replace(job, use_distributed_optimizer=True))
    for name in ("selective", "full"):
        spec = with_recompute(job.spec, name)
        if spec != job.spec:
            keys = '"recompute_granularity": "selective"' if name == "selective" else FULL
            yield Remedy(f"{keys} in the model config", replace(job, spec=spec))
    for flag, runtime in (
        ("--tensor-model-parallel-size", {"tensor_model_parallel_size": 2 * job.tensor, "sequence_parallel": True}),
        ("--pipeline-model-parallel-size", {"pipeline_model_parallel_size": 2 * job.pipeline}),
        ("--context-parallel-size", {"context_parallel_size": 2 * job.context}),
    ):
        if job.data_parallel_size % 2 == 0:
            spread = replace(
                job,
                runtime=replace(job.runtime, **runtime),
                data_parallel_size=job.data_parallel_size // 2,
                num_micro_batches=2 * job.num_micro_batches,
            )
            if not layout_problems(spread.spec, spread.runtime):
                size = next(iter(runtime.values()))
                extra = " --sequence-parallel" if "sequence_parallel" in runtime else ""
                yield Remedy(f"{flag} {size}{extra}", spread)


FULL = '"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1'


def longest_row(inputs: RunInputs) -> PlannedRow:
    """The longest rows that the run may have, all text supervised: what filled the memory was one of them."""
    args, spec = inputs.args, inputs.spec
    length = args.seq_length or spec.text_decoder.language_max_sequence_length
    loading = inputs.data_config.dataloader_param
    if loading.packing:
        length = loading.packing_length or length
    return PlannedRow(positions=length, lengths=(float(length),), images=1.0)


def _snapshot(inputs: RunInputs) -> Path | None:
    """Write the allocator's state beside the checkpoints, where the platform can."""
    if inputs.args.save is None:
        return None
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    path = Path(inputs.args.save) / f"out_of_memory_rank{rank}.pickle"
    return path if inputs.platform.memory_snapshot(path) else None
