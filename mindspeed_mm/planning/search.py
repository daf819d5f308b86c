"""All layouts of a model on a number of devices, which of them fit, and which is the fastest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from mindspeed_mm.models.spec import ModelSpec
from mindspeed_mm.planning.communication import Traffic, stage_traffic
from mindspeed_mm.planning.duration import StepTime, step_time
from mindspeed_mm.planning.hardware import Hardware, known
from mindspeed_mm.planning.job import TrainingJob
from mindspeed_mm.planning.memory import RankMemory, peak_memory

RECOMPUTE = ("none", "selective", "full")
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
REFERENCE = "A100"
"""Layouts are compared by this device's ratios where the one at hand has no figures; no times are shown then."""


class ParallelStrategy(NamedTuple):
    """What the search varies; None: not decided."""

    tensor: int | None = None
    pipeline: int | None = None
    context: int | None = None
    micro_batch: int | None = None
    recompute: str | None = None
    """none, selective, full, or model for what the model.json says."""

    @property
    def decided(self) -> bool:
        """Whether nothing is left to vary."""
        return None not in self


@dataclass(frozen=True)
class Plan:
    """One layout with its predictions."""

    job: TrainingJob
    strategy: ParallelStrategy
    memory: RankMemory
    """Of the rank that needs most."""
    traffic: Traffic
    """Of the same rank."""
    time: StepTime | None
    """None where the device's figures are unknown."""
    cost: float
    """Compared between layouts: seconds for a sample, or a measure of it."""


def strategies(devices: int, given: ParallelStrategy, *, devices_per_host: int) -> Iterator[ParallelStrategy]:
    """Every combination of sizes that divides `devices`, with what is given kept.

    Tensor and context parallelism, which communicate in every layer, stay inside a host unless they are given.
    """
    inside = [size for size in _divisors(devices) if size <= devices_per_host]
    for tensor in _choices(given.tensor, inside):
        for pipeline in _choices(given.pipeline, _divisors(devices)):
            for context in _choices(given.context, inside):
                group = tensor * pipeline * context
                if devices % group and not given.decided:
                    continue
                for micro_batch in _choices(given.micro_batch, MICRO_BATCHES):
                    for recompute in _choices(given.recompute, RECOMPUTE):
                        yield ParallelStrategy(tensor, pipeline, context, micro_batch, recompute)


def _choices(given, options):
    return options if given is None else (given,)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def with_recompute(spec: ModelSpec, recompute: str) -> ModelSpec:
    """The spec with recomputation of its trained parts, and of what stands behind them, set; "model" leaves it."""
    if recompute == "model":
        return spec
    fields = {"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None}
    if recompute == "selective":
        fields["recompute_granularity"] = "selective"
    elif recompute == "full":
        fields = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    encoder = spec.image_encoder
    if spec.vision_encoder.trains:
        vision_encoder = spec.vision_encoder.model_copy(update=fields)
        encoder = encoder.model_copy(update={"vision_encoder": vision_encoder})
    text = spec.text_decoder.model_copy(update=fields)
    return spec.model_copy(update={"text_decoder": text, "image_encoder": encoder})


def evaluate(job: TrainingJob, strategy: ParallelStrategy, hardware: Hardware) -> Plan:
    """Predictions of one layout."""
    memory = peak_memory(job)
    time = step_time(job, hardware) if hardware.times_known else None
    compared = time or step_time(job, known()[REFERENCE])
    return Plan(job, strategy, memory, stage_traffic(job, memory.stage), time, compared.total / job.global_batch_size)


def ranked(plans: list[Plan], limit: float) -> tuple[list[Plan], list[Plan]]:
    """(those that fit into `limit` bytes, fastest first; the others, smallest first)."""
    fitting = sorted((plan for plan in plans if plan.memory.peak <= limit), key=_order)
    others = sorted((plan for plan in plans if plan.memory.peak > limit), key=lambda plan: plan.memory.peak)
    return fitting, others


def _order(plan: Plan) -> tuple[float, float]:
    """Faster first, then the smaller."""
    return (float(f"{plan.cost:.3g}"), plan.memory.peak)
