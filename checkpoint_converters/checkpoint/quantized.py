"""A text decoder whose linears are written in 4 or 8 bits, as a QLoRA run keeps them (convert --quantize).

A run that begins with such a checkpoint (--pretrained-checkpoint) reads each rank's share of the stored bytes and
nothing else: no weight is whole on the way. Blocks lie inside a row, so the stored values fit every layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from checkpoint_converters.plan import Job, Output
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.adapters.base_hash import QUANTIZED_FROM, base_hash
from mindspeed_mm.models.adapters.targets import WEIGHT, all_sites
from mindspeed_mm.models.part import PartSpec, part_of
from mindspeed_mm.weights.blockwise import BLOCK, stored_form, stored_shapes
from mindspeed_mm.weights.layouts import OUR_MODEL, TEXT
from mindspeed_mm.weights.loading import is_finite
from mindspeed_mm.weights.rules import Step
from mindspeed_mm.weights.sources import Source


class _StoredWeight:
    """Makes the tensors of one stored weight, which are asked for one after the other, out of one reading."""

    def __init__(self, job: Job, step: Step, kind: str, *, small_scales: bool) -> None:
        self._job, self._axis, self._kind, self._small = job, step.rule.axis, kind, small_scales
        self._left: dict[str, Tensor] = {}

    def jobs(self) -> Iterator[Job]:
        """A job for each of its tensors."""
        (whole,) = self._job.outputs
        shapes = stored_shapes(whole.shape, self._kind, self._axis, small_scales=self._small)
        for name, (shape, dtype) in shapes.items():
            yield Job(
                (Output(f"{whole.name.removesuffix(WEIGHT)}.{name}", shape, dtype),), lambda name=name: self._make(name)
            )

    def _make(self, name: str) -> list[Tensor]:
        if name not in self._left:
            (weight,) = self._job.make()
            if not is_finite(weight):
                raise WeightError(
                    f"quantize {self._kind}: {self._job.outputs[0].name} has NaN or Inf, which would spoil the {BLOCK} "
                    "values of a block; expected finite weights. Take another copy of them"
                )
            self._left = dict(stored_form(weight, self._kind, self._axis, small_scales=self._small).tensors)
        return [self._left.pop(name)]


def stored_jobs(jobs: Sequence[Job], spec: PartSpec) -> list[Job]:
    """The jobs of a part's tensors, those of its layers' linears stored as spec.quantize says.

    Raises WeightError for a linear whose columns are no whole blocks.
    """
    part, prefix = part_of(TEXT, spec), OUR_MODEL.written[TEXT]
    steps = {prefix + site.step.target: site.step for site in all_sites(part, spec)}
    result: list[Job] = []
    for job in jobs:
        (output,) = job.outputs
        if output.name not in steps:
            result.append(job)
            continue
        if output.shape[1] % BLOCK:
            raise WeightError(
                f"quantize {spec.quantize}: {output.name} has {output.shape[1]} columns; expected a multiple of "
                f"{BLOCK}, the values that share a scale. Leave --quantize out"
            )
        result += _StoredWeight(job, steps[output.name], spec.quantize, small_scales=spec.double_quant).jobs()
    return result


def as_quantized(spec: PartSpec, kind: str, *, double_quant: bool) -> PartSpec:
    """A decoder's spec that says how it is stored."""
    return spec.model_copy(update={"quantize": kind, "double_quant": double_quant, "freeze": True})


def facts_of(source: Source, spec: PartSpec, jobs: Sequence[Job]) -> tuple[dict[str, bool], dict[str, Any]]:
    """(precision of run.json's layout, what its `extra` says of the weights): the type that they are made whole in, and
    the hash by which adapters know their base."""
    dtypes = {output.dtype for job in jobs for output in job.outputs if output.name.endswith(WEIGHT)}
    precision = {"bf16": torch.bfloat16 in dtypes, "fp16": torch.float16 in dtypes and torch.bfloat16 not in dtypes}
    return precision, {QUANTIZED_FROM: {TEXT: base_hash(part_of(TEXT, spec), spec, source)}}
