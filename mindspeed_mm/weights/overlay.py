"""A part of which one file holds some tensors and another one the rest: what was trained over what was there before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mindspeed_mm.weights.files import Span
from mindspeed_mm.weights.sources import PartSource


class Overlay:
    """A tensor file of two parts' tensors. `own` are those of `trained`; `below` names those of `base`."""

    record = None

    def __init__(self, trained: PartSource, base: PartSource, below: Mapping[str, str]) -> None:
        self.path = trained.path
        self.trained = frozenset(trained.names)
        self._holder = {name: (base, old) for name, old in below.items()}
        self._holder |= {name: (trained, name) for name in trained.names}
        self.names = tuple(self._holder)

    @classmethod
    def join(cls, trained: PartSource, base: PartSource, below: Mapping[str, str]) -> PartSource:
        """`trained` with the tensors of `base` that it lacks, by their new names; the config is that of `base`."""
        files = cls(trained, base, below)
        return replace(trained, config=base.config, _files=files, _stored={name: name for name in files.names})

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        source, stored = self._holder[name]
        return source.shape(stored)

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of a tensor, without reading it."""
        source, stored = self._holder[name]
        return source.dtype(stored)

    def get(self, name: str) -> Tensor:
        """Read one tensor onto the CPU."""
        source, stored = self._holder[name]
        return source.get(stored)

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Read the indices start..stop-1 of one axis of a tensor."""
        source, stored = self._holder[name]
        return source.get_slice(stored, axis, start, stop)

    def span(self, name: str) -> Span | None:
        """The bytes of a tensor in its file; None where they lie in another order than row by row."""
        source, stored = self._holder[name]
        return source.span(stored)


def trained_names(part: PartSource) -> frozenset[str] | None:
    """The names of a part's tensors that its own file holds, where the rest lies below it; None where there is one
    file."""
    return getattr(part.files, "trained", None)
