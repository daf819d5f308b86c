"""Parameters of each rank, counted from the parts' tensor shapes and weight rules: exact, for any part.

A rule knows along which axis tensor parallelism splits its tensor; layers are shared between stages as
models/parallel.py says.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

from mindspeed_mm.models.adapters.splits import places
from mindspeed_mm.models.adapters.targets import all_sites, sites
from mindspeed_mm.models.parallel import stage_layers
from mindspeed_mm.models.trainable import setting
from mindspeed_mm.planning.job import TrainingJob
from mindspeed_mm.weights.blockwise import bytes_of
from mindspeed_mm.weights.rule_names import is_layered, layer_of
from mindspeed_mm.weights.rules import Step
from mindspeed_mm.weights.shards import padded_vocab_size

ON_LAST_STAGE = ("decoder.final_layernorm.", "output_layer.")
"""Tensors of the text decoder that stand on the last pipeline stage; what else has no layer stands on the first."""

RECOMPUTATION = {"recompute_granularity", "recompute_method", "recompute_num_layers"}
"""Keys of a part on which its parameters do not depend."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters on one rank."""

    total: int
    trained: int
    largest: int
    """Of the largest trained tensor."""
    bytes: float
    """That hold all of them."""
    matrices: int
    """Of the trained ones, those in matrices of linears and in adapters' A and B; counted where Muon moves them."""


@dataclass(frozen=True)
class _HeldTensor:
    """A tensor on one rank: its elements, whether they are trained, and its bytes."""

    size: int
    trained: bool
    bytes: float
    matrix: bool = False
    """Whether it is what Muon moves."""


def held_numbers(job: TrainingJob, stage: int) -> list[int]:
    """Numbers, from 0, of the decoder layers of a pipeline stage, over all its chunks."""
    chunks = stage_layers(job.spec.text_decoder, job.runtime.stages)
    ends = list(itertools.accumulate(chunks, initial=0))
    return [number for chunk in range(stage, len(chunks), job.pipeline) for number in range(*ends[chunk : chunk + 2])]


def held_layers(job: TrainingJob, stage: int) -> int:
    """Decoder layers of a pipeline stage, over all its chunks."""
    return len(held_numbers(job, stage))


def held_blocks(job: TrainingJob, stage: int) -> int:
    """Blocks of gated cross-attention on a pipeline stage."""
    shape = job.spec.text_decoder.cross_shape
    return 0 if shape is None else shape.on(held_numbers(job, stage))


@dataclass(frozen=True)
class _CountedStage:
    """A pipeline stage of a job. Two of them are equal where all that their parameters depend on is."""

    job: TrainingJob = field(compare=False)
    stage: int
    spec: str
    spread: tuple[int, ...]
    """Tensor and pipeline-parallel size, virtual stages, bytes of an element, whether Muon is the optimizer."""


def stage_parameters(job: TrainingJob, stage: int) -> Parameters:
    """Parameters that a rank of this pipeline stage holds.

    They are counted once: a search asks several times for each of many layouts that differ in batch and recomputation.
    """
    without = {"text_decoder": RECOMPUTATION, "image_encoder": {"vision_encoder": RECOMPUTATION}}
    spec = job.spec.model_dump_json(exclude=without, serialize_as_any=True)
    spread = (job.tensor, job.pipeline, job.runtime.stages, job.element, job.muon)
    return _counted(_CountedStage(job, stage, spec, spread))


@functools.lru_cache(maxsize=1024)
def _counted(counted: _CountedStage) -> Parameters:
    job, stage = counted.job, counted.stage
    parts = [part_parameters(job, kind, stage) for kind in job.spec.part_specs()]
    return Parameters(
        sum(part.total for part in parts),
        sum(part.trained for part in parts),
        max(part.largest for part in parts),
        sum(part.bytes for part in parts),
        sum(part.matrices for part in parts),
    )


def part_parameters(job: TrainingJob, kind: str, stage: int) -> Parameters:
    """Those of one part."""
    tensors = [*_tensors(job, kind, stage)]
    adapters = _adapter_sizes(job, kind, stage)
    tensors += [_HeldTensor(size, True, size * job.element, matrix) for size, matrix in adapters]
    trained = [tensor for tensor in tensors if tensor.trained]
    return Parameters(
        sum(tensor.size for tensor in tensors),
        sum(tensor.size for tensor in trained),
        max((tensor.size for tensor in trained), default=0),
        sum(tensor.bytes for tensor in tensors),
        sum(tensor.size for tensor in trained if tensor.matrix),
    )


def _adapter_sizes(job: TrainingJob, kind: str, stage: int) -> Iterator[tuple[int, bool]]:
    """(elements, whether it is a matrix) of each A and B of one part on this stage, and of DoRA's lengths."""
    spec, part = job.spec.part(kind), job.spec.parts()[kind]
    if spec.lora is None or (kind != "text_decoder" and stage != _home(job, kind)):
        return
    shapes, held = part.shapes(spec), set(held_numbers(job, stage))
    for site in sites(part, spec):
        if kind == "text_decoder" and not _stands_on(site.step, job, stage, held):
            continue
        rows, columns = shapes.get(site.step.target) or shapes[site.step.rule.target]
        own = places(site, rows, spec.geometry)
        rows = rows if own is None else len(own)
        split = job.tensor if site.step.rule.axis == 0 else 1, job.tensor if site.step.rule.axis == 1 else 1
        rank = spec.lora.rank_of(site.module)
        yield round(rank * rows / split[0]), True
        yield round(rank * columns / split[1]), True
        if spec.lora.use_dora:
            yield round(rows / split[0]), False


def _tensors(job: TrainingJob, kind: str, stage: int) -> Iterator[_HeldTensor]:
    """The tensors of one part on this stage."""
    spec, part = job.spec.part(kind), job.spec.parts()[kind]
    if kind != "text_decoder" and stage != _home(job, kind):
        return
    shapes, held = part.shapes(spec), set(held_numbers(job, stage))
    linears = {site.step.target for site in all_sites(part, spec)} if spec.quantize or job.muon else set()
    stored = linears if spec.quantize else set()
    for step in part.rules["ours"].steps(spec.geometry):
        if step.unused or (kind == "text_decoder" and not _stands_on(step, job, stage, held)):
            continue
        shape = shapes.get(step.target) or shapes[step.rule.target]
        size = _share(step, shape, job.tensor)
        few = bytes_of(size, spec.quantize, small_scales=spec.double_quant) if step.target in stored else None
        held_bytes = size * job.element if few is None else few
        yield _HeldTensor(size, setting(spec, step.target).trained, held_bytes, step.target in linears)


def _home(job: TrainingJob, kind: str) -> int:
    """The pipeline stage that holds a part which is not spread."""
    return job.pipeline - 1 if kind == "interaction" else 0


def _stands_on(step: Step, job: TrainingJob, stage: int, held: Container[int]) -> bool:
    """Whether a tensor of the text decoder is on a stage that has the layers `held`."""
    if is_layered(step.rule.target):
        return layer_of(step.rule.target, step.target) in held
    if step.target.startswith(ON_LAST_STAGE):
        return stage == job.pipeline - 1
    # A tied head on another stage than the embedding holds a copy of it.
    tied = job.spec.text_decoder.geometry.tied and step.target.startswith("embedding.")
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
