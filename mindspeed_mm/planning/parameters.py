"""Parameters of each rank, counted from the parts' tensor shapes and weight rules: exact, for any part.

A rule knows along which axis tensor parallelism splits its tensor; layers are shared between stages as
models/parallel.py says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mindspeed_mm.models.parallel import stage_layers
from mindspeed_mm.models.part import SLOTS
from mindspeed_mm.planning.job import TrainingJob
from mindspeed_mm.weights.rules import Step, is_layered
from mindspeed_mm.weights.shards import padded_vocab_size

ON_LAST_STAGE = ("decoder.final_layernorm.", "output_layer.")
"""Tensors of the text decoder that stand on the last pipeline stage; what else has no layer stands on the first."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters on one rank."""

    total: int
    trained: int
    largest: int
    """Of the largest trained tensor."""


def held_layers(job: TrainingJob, stage: int) -> int:
    """Decoder layers of a pipeline stage, over all its chunks."""
    return sum(stage_layers(job.spec.text_decoder, job.runtime.stages)[stage :: job.pipeline])


def stage_parameters(job: TrainingJob, stage: int) -> Parameters:
    """Parameters that a rank of this pipeline stage holds."""
    sizes = {kind: list(_sizes(job, kind, stage)) for kind in SLOTS}
    trained = [size for kind in SLOTS if job.trained(kind) for size in sizes[kind]]
    return Parameters(sum(map(sum, sizes.values())), sum(trained), max(trained, default=0))


def _sizes(job: TrainingJob, kind: str, stage: int) -> Iterator[int]:
    """Elements of each tensor of one part on this stage."""
    spec, part = job.spec.part(kind), job.spec.parts()[kind]
    if kind != "text_decoder" and stage > 0:
        return
    shapes = part.shapes(spec)
    layered: list[int] = []
    for step in part.rules["ours"].steps(spec.geometry):
        if step.unused:
            continue
        shape = shapes.get(step.target) or shapes[step.rule.target]
        size = _share(step, shape, job.tensor)
        if kind == "text_decoder" and is_layered(step.rule.target):
            layered.append(size)
        elif kind != "text_decoder" or _stands_on(step.target, job, stage):
            yield size
    # Layers are alike, and steps come rule by rule, each for all layers: every num_layers-th is another tensor.
    for size in layered[:: spec.geometry.num_layers]:
        yield from [size] * held_layers(job, stage)


def _stands_on(target: str, job: TrainingJob, stage: int) -> bool:
    if target.startswith(ON_LAST_STAGE):
        return stage == job.pipeline - 1
    # A tied head on another stage than the embedding holds a copy of it.
    tied = job.spec.text_decoder.geometry.tied and target.startswith("embedding.")
    return stage == 0 or (tied and stage == job.pipeline - 1)


def _share(step: Step, shape: tuple[int, ...], tensor: int) -> int:
    """Elements that one tensor-parallel rank holds of a tensor."""
    if step.rule.axis is None or tensor == 1:
        return math.prod(shape)
    sizes = list(shape)
    if step.rule.padded:
        sizes[0] = padded_vocab_size(sizes[0], tensor)
    sizes[step.rule.axis] //= tensor
    return math.prod(sizes)
