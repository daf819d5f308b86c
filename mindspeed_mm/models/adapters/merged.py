"""Weights with adapters merged into them, in the form of a tensor file: values are made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mindspeed_mm.weights.blockwise import StoredForm
from mindspeed_mm.weights.files import Span, TensorFile


class MergedFile:
    """A tensor file in which some tensors are changed as they are read; names and shapes stay.

    changes: name -> function of the stored tensor in float32 that gives the merged one.
    hidden: names that are left out (the adapters themselves).
    dtype: of the changed tensors; None: as they are stored.
    """

    record = None

    def __init__(
        self,
        base: TensorFile,
        changes: Mapping[str, Callable[[Tensor], Tensor]],
        hidden: frozenset[str] = frozenset(),
        dtype: torch.dtype | None = None,
    ) -> None:
        self._base, self._changes, self._dtype = base, dict(changes), dtype
        self.path = base.path
        self.names = tuple(name for name in base.names if name not in hidden)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, without reading it."""
        return self._dtype if self._dtype is not None and name in self._changes else self._base.dtype(name)

    def get(self, name: str) -> Tensor:
        """Read one tensor onto the CPU; a merged one is computed in float32 and rounded once."""
        tensor = self._base.get(name)
        if name not in self._changes:
            return tensor
        return self._changes[name](tensor.float()).to(self.dtype(name))

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Read the indices start..stop-1 of one axis of a tensor."""
        if name not in self._changes:
            return self._base.get_slice(name, axis, start, stop)
        return self.get(name).narrow(axis, start, stop - start).contiguous()

    def span(self, name: str) -> Span | None:
        """The bytes of a tensor in its file; None for a merged one, which no file holds."""
        return None if name in self._changes else self._base.span(name)

    def stored_form(self, name: str) -> StoredForm | None:
        """A tensor in 4 or 8 bits, as it is stored; None for one that is whole there, or merged."""
        read = None if name in self._changes else getattr(self._base, "stored_form", None)
        return None if read is None else read(name)

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the tensors that are changed."""
        return tuple(self._changes)

    @property
    def bytes_read(self) -> int:
        """Bytes that were read of the base."""
        return self._base.bytes_read
