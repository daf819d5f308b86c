"""Weights that a run stored in 4 or 8 bits, made whole as they are read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mindspeed_mm.models.adapters.targets import all_sites
from mindspeed_mm.models.spec import ModelSpec
from mindspeed_mm.weights.blockwise import BLOCK, Blocks, StoredForm, dequantize, stored_scales
from mindspeed_mm.weights.files import Span, TensorFile

CODES, SCALES, RANGES, WEIGHT = ".codes", ".scales", ".ranges", ".weight"


class StoredAs(NamedTuple):
    """How a linear is stored, and the axis along which tensor parallelism splits it."""

    kind: str
    axis: int


class WholeFile:
    """A tensor file in which codes and scales stand as the weights that they are.

    stored: name of a weight -> how it is stored.
    dtype: of the weights that are made.
    """

    record = None

    def __init__(self, base: TensorFile, stored: dict[str, StoredAs], dtype: torch.dtype) -> None:
        self._base, self._as, self._dtype = base, stored, dtype
        self.path = base.path
        owners = [name.removesuffix(CODES) for name in base.names if name.endswith(CODES)]
        self._stored = {owner + WEIGHT: owner for owner in owners}
        hidden = {owner + end for owner in owners for end in (CODES, SCALES, RANGES)}
        self.names = (*(name for name in base.names if name not in hidden), *self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        if name not in self._stored:
            return self._base.shape(name)
        rows, blocks = self._base.shape(self._stored[name] + SCALES)
        return rows, blocks * BLOCK

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, without reading it."""
        return self._dtype if name in self._stored else self._base.dtype(name)

    def get(self, name: str) -> Tensor:
        """Read one tensor onto the CPU."""
        return self.get_slice(name, 0, 0, self.shape(name)[0]) if name in self._stored else self._base.get(name)

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Read the indices start..stop-1 of one axis of a tensor."""
        if name not in self._stored:
            return self._base.get_slice(name, axis, start, stop)
        if axis != 0:
            return self.get(name).narrow(axis, start, stop - start).contiguous()
        owner, (kind, split) = self._stored[name], self._as[name]
        codes = self._base.get_slice(owner + CODES, 0, start, stop)
        ranges = [self._base.get(owner + RANGES)] if owner + RANGES in self._base.names else []
        scales = stored_scales([self._base.get(owner + SCALES), *ranges], split)[start:stop].contiguous()
        return dequantize(Blocks(codes, scales), kind, self._dtype)

    def stored_form(self, name: str) -> StoredForm | None:
        """A weight as it is stored; None for one that is whole."""
        if name not in self._stored:
            return None
        owner = self._stored[name]
        ends = (end for end in (CODES, SCALES, RANGES) if owner + end in self._base.names)
        return StoredForm(self._as[name].kind, {end[1:]: self._base.get(owner + end) for end in ends})

    def span(self, name: str) -> Span | None:
        """The bytes of a tensor in its file; None for one that is made."""
        return None if name in self._stored else self._base.span(name)

    @property
    def bytes_read(self) -> int:
        """Bytes that were read of the base."""
        return self._base.bytes_read


def whole_weights(file: TensorFile, spec: ModelSpec, layout: dict[str, bool], prefixes: dict[str, str]) -> TensorFile:
    """The file of a run with its stored weights made whole, in the precision of the run; the file itself where none is
    stored. `prefixes` are what stands before each slot's names."""
    stored = {
        prefixes[slot] + site.step.target: StoredAs(part.quantize, site.step.rule.axis)
        for slot, part in spec.part_specs().items()
        if part.quantize
        for site in all_sites(spec.parts()[slot], part)
    }
    if not stored:
        return file
    dtype = torch.bfloat16 if layout["bf16"] else torch.float16 if layout["fp16"] else torch.float32
    return WholeFile(file, stored, dtype)
