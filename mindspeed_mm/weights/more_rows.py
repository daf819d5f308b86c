"""A part whose vocabulary is larger than that of its weights: words that were added to the tokenizer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from mindspeed_mm.weights.files import Span
from mindspeed_mm.weights.overlay import trained_names
from mindspeed_mm.weights.sources import PartSource


class MoreRows:
    """A tensor file of a part's tensors, of which some have `rows` rows: new ones are the mean of those that are
    there."""

    record = None

    def __init__(self, part: PartSource, longer: Collection[str], rows: int) -> None:
        self.path, self._part, self._longer, self._rows = part.path, part, frozenset(longer), rows
        self.names, self.trained = part.names, trained_names(part)

    @classmethod
    def of(cls, part: PartSource, longer: Collection[str], rows: int) -> PartSource:
        """`part` with the tensors `longer` [V, H] as [rows, H]."""
        files = cls(part, longer, rows)
        return replace(part, _files=files, _stored={name: name for name in files.names})

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        shape = self._part.shape(name)
        return (self._rows, *shape[1:]) if name in self._longer else shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of a tensor, without reading it."""
        return self._part.dtype(name)

    def get(self, name: str) -> Tensor:
        """Read one tensor onto the CPU."""
        tensor = self._part.get(name)
        if name not in self._longer:
            return tensor
        mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
        return torch.cat((tensor, mean.expand(self._rows - len(tensor), -1)))

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Read the indices start..stop-1 of one axis of a tensor."""
        if name not in self._longer:
            return self._part.get_slice(name, axis, start, stop)
        return self.get(name).narrow(axis, start, stop - start)

    def span(self, name: str) -> Span | None:
        """The bytes of a tensor in its file; None where they are not there as they are read."""
        return None if name in self._longer else self._part.span(name)
