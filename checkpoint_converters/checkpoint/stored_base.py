"""Weights that a run stored in 4 or 8 bits, made whole as they are read."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_mm.weights.blockwise import BLOCK, Blocks, dequantize
from mindspeed_mm.weights.files import Span, TensorFile

CODES, SCALES, WEIGHT = ".codes", ".scales", ".weight"


class WholeFile:
    """A tensor file in which codes and scales stand as the weights that they are.

    kinds: prefix of names -> how the linears under it are stored.
    dtype: of the weights that are made.
    """

    record = None

    def __init__(self, base: TensorFile, kinds: dict[str, str], dtype: torch.dtype) -> None:
        self._base, self._kinds, self._dtype = base, kinds, dtype
        self.path = base.path
        stored = [name.removesuffix(CODES) for name in base.names if name.endswith(CODES)]
        self._stored = {owner + WEIGHT: owner for owner in stored}
        hidden = {owner + end for owner in stored for end in (CODES, SCALES)}
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
        owner = self._stored[name]
        codes, scales = (self._base.get_slice(owner + end, 0, start, stop) for end in (CODES, SCALES))
        kind = next(kind for prefix, kind in self._kinds.items() if name.startswith(prefix))
        return dequantize(Blocks(codes, scales.view(torch.float32)), kind, self._dtype)

    def span(self, name: str) -> Span | None:
        """The bytes of a tensor in its file; None for one that is made."""
        return None if name in self._stored else self._base.span(name)

    @property
    def bytes_read(self) -> int:
        """Bytes that were read of the base."""
        return self._base.bytes_read


def whole_weights(file: TensorFile, spec, layout: dict[str, bool], prefixes: dict[str, str]) -> TensorFile:
    """The file of a run with its stored weights made whole, in the precision of the run; the file itself where none is
    stored. `prefixes` are what stands before each slot's names."""
    kinds = {prefixes[slot]: part.quantize for slot, part in spec.part_specs().items() if part.quantize}
    if not kinds:
        return file
    dtype = torch.bfloat16 if layout["bf16"] else torch.float16 if layout["fp16"] else torch.float32
    return WholeFile(file, kinds, dtype)
