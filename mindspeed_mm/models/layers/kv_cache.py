"""Preallocated key/value cache of the sequences that are being generated.

Legend: R rows in use, G key/value heads of this rank, L cache length, S new tokens, D head size.
"""

from __future__ import annotations

import torch

LENGTH_STEP = 64
"""Lengths are rounded up to a multiple of this, so that slightly longer requests find room."""


class KVCache:
    """Keys and values of every decoder layer of this pipeline stage.

    Rows may have different lengths: row b holds its tokens at 0..length[b]-1, and rows in use are 0..R-1. A forward
    pass of the decoder is announced by `begin_prefill` (whole prompts into fresh rows) or `begin_step` (one token for
    each row in use); its layers then call `update`. Memory is kept and grows with `reserve`.
    """

    def __init__(self, layers: int, heads: int, head_size: int, dtype: torch.dtype, device: torch.device) -> None:
        empty = torch.empty(0, heads, 0, head_size, dtype=dtype, device=device)
        self.keys, self.values = [empty] * layers, [empty] * layers
        self._rows: torch.Tensor | slice = slice(0, 0)
        self._slots: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None
        self._used = self._span = 0

    @property
    def rows(self) -> int:
        """Rows there is memory for."""
        return self.keys[0].shape[0] if self.keys else 0

    @property
    def length(self) -> int:
        """L"""
        return self.keys[0].shape[2] if self.keys else 0

    def reserve(self, rows: int, length: int) -> None:
        """Make room for `rows` sequences of `length` tokens; what is stored stays."""
        length = -(-length // LENGTH_STEP) * LENGTH_STEP
        rows, length = max(rows, self.rows), max(length, self.length)
        if (rows, length) == (self.rows, self.length):
            return
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_zeros(rows, old.shape[1], length, old.shape[3])
                tensors[layer][: old.shape[0], :, : old.shape[2]] = old

    def begin_prefill(self, first_row: int, rows: int) -> None:
        """Announce prompts for the rows from `first_row` on, each at positions 0, 1, ... A shorter prompt's surplus
        positions hold padding, which later tokens overwrite."""
        self._rows, self._slots = slice(first_row, first_row + rows), None

    def begin_step(self, lengths: list[int]) -> None:
        """Announce one token for each of the rows 0..R-1, at the position `lengths` [R]."""
        self._used, self._span = len(lengths), max(lengths) + 1
        if self._span > self.length:
            raise ValueError(f"the cache holds {self.length} positions, position {self._span - 1} was asked for")
        device = self.keys[0].device
        self._slots = torch.tensor(lengths, device=device)
        self._rows = torch.arange(self._used, device=device)
        self._mask = None
        if min(lengths) != max(lengths):
            slots = torch.arange(self._span, device=device)
            self._mask = (slots <= self._slots[:, None])[:, None, None, :]

    def update(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Store the new keys and values of a layer and return all that the new tokens may attend to.

        Args:
            layer: index within this pipeline stage.
            key, value: [R, G, S, D].

        Returns:
            keys, values [R, G, K, D] and the mask [R, 1, S, K], True = may attend. No mask: all K for a step, causal
            for prompts.
        """
        keys, values = self.keys[layer], self.values[layer]
        if self._slots is None:
            keys[self._rows, :, : key.shape[2]] = key
            values[self._rows, :, : value.shape[2]] = value
            return key, value, None
        keys[self._rows, :, self._slots] = key[:, :, 0]
        values[self._rows, :, self._slots] = value[:, :, 0]
        return keys[: self._used, :, : self._span], values[: self._used, :, : self._span], self._mask

    def copy_rows(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy the first `length` positions of rows onto others, all at once (a row may be source and target)."""
        if not sources:
            return
        device = self.keys[0].device if self.keys else None
        source, target = torch.tensor(sources, device=device), torch.tensor(targets, device=device)
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[target, :, :length] = tensor[source, :, :length]
