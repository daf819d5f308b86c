"""Parameters of each rank, counted from the parts' tensor shapes and weight rules: exact, for any part.

A rule knows along which axis tensor parallelism splits its tensor; layers are shared between stages as
models/parallel.py says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mindspeed_mm.models.adapters.splits import places
from mindspeed_mm.models.adapters.targets import all_sites, sites
from mindspeed_mm.models.parallel import stage_layers
from mindspeed_mm.models.part import SLOTS
from mindspeed_mm.models.trainable import setting
from mindspeed_mm.planning.job import TrainingJob
from mindspeed_mm.weights.blockwise import bytes_of
from mindspeed_mm.weights.rule_names import is_layered
from mindspeed_mm.weights.rules import Step
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
    bytes: float
    """That hold all of them."""


@dataclass(frozen=True)
class _HeldTensor:
    """A tensor on one rank: its elements, the share of them that is trained, and its bytes."""

    size: int
    trained: float
    bytes: float


def held_layers(job: TrainingJob, stage: int) -> int:
    """Decoder layers of a pipeline stage, over all its chunks."""
    return sum(stage_layers(job.spec.text_decoder, job.runtime.stages)[stage :: job.pipeline])


def stage_parameters(job: TrainingJob, stage: int) -> Parameters:
    """Parameters that a rank of this pipeline stage holds."""
    parts = [part_parameters(job, kind, stage) for kind in SLOTS]
    return Parameters(
        sum(part.total for part in parts),
        sum(part.trained for part in parts),
        max(part.largest for part in parts),
        sum(part.bytes for part in parts),
    )


def part_parameters(job: TrainingJob, kind: str, stage: int) -> Parameters:
    """Those of one part."""
    tensors = [*_tensors(job, kind, stage)]
    tensors += [_HeldTensor(size, 1.0, size * job.element) for size in _adapter_sizes(job, kind, stage)]
    return Parameters(
        sum(tensor.size for tensor in tensors),
        round(sum(tensor.size * tensor.trained for tensor in tensors)),
        max((tensor.size for tensor in tensors if tensor.trained), default=0),
        sum(tensor.bytes for tensor in tensors),
    )


def _adapter_sizes(job: TrainingJob, kind: str, stage: int) -> Iterator[int]:
    """Elements of each A and B of one part on this stage; layers count as many times as the stage holds them."""
    spec, part = job.spec.part(kind), job.spec.parts()[kind]
    if spec.lora is None or (kind != "text_decoder" and stage > 0):
        return
    shapes = part.shapes(spec)
    share = held_layers(job, stage) / spec.geometry.num_layers if kind == "text_decoder" else 1.0
    for site in sites(part, spec):
        rows, columns = shapes.get(site.step.target) or shapes[site.step.rule.target]
        own = places(site, rows, spec.geometry)
        rows = rows if own is None else len(own)
        split = job.tensor if site.step.rule.axis == 0 else 1, job.tensor if site.step.rule.axis == 1 else 1
        yield round(share * spec.lora.r * rows / split[0])
        yield round(share * spec.lora.r * columns / split[1])
        if spec.lora.use_dora:
            yield round(share * rows / split[0])


def _tensors(job: TrainingJob, kind: str, stage: int) -> Iterator[_HeldTensor]:
    """The tensors of one part on this stage; the trained layers are taken to be spread evenly over the stages."""
    spec, part = job.spec.part(kind), job.spec.parts()[kind]
    if kind != "text_decoder" and stage > 0:
        return
    shapes = part.shapes(spec)
    stored = {site.step.target for site in all_sites(part, spec)} if spec.quantize else set()
    layered: list[_HeldTensor] = []
    for step in part.rules["ours"].steps(spec.geometry):
        if step.unused:
            continue
        shape = shapes.get(step.target) or shapes[step.rule.target]
        size = _share(step, shape, job.tensor)
        held = bytes_of(size, spec.quantize) if step.target in stored else size * job.element
        tensor = _HeldTensor(size, setting(spec, step.target).trained, held)
        if kind == "text_decoder" and is_layered(step.rule.target):
            layered.append(tensor)
        elif kind != "text_decoder" or _stands_on(step.target, job, stage):
            yield tensor
    # Layers are alike, and steps come rule by rule, each for all layers: every num_layers-th is another tensor.
    layers = spec.geometry.num_layers
    for first in range(0, len(layered), layers):
        alike = layered[first : first + layers]
        mean = replace(alike[0], trained=sum(tensor.trained for tensor in alike) / layers)
        yield from [mean] * held_layers(job, stage)


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
