"""Preallocated key/value cache of the sequences that are being generated.

Legend: R rows in use, G key/value heads of this rank, L cache length, S new tokens of a row, T of all rows together, D
head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mindspeed_mm.platform.segments import Segments

LENGTH_STEP = 64
"""Lengths are rounded up to a multiple of this, so that slightly longer requests find room."""


class KVCache:
    """Keys and values of every decoder layer of this pipeline stage.

    Rows may have different lengths: row b holds its tokens at 0..length[b]-1. A forward pass of the decoder is
    announced by `begin`; its layers then call `update`. With `begin_packed` and `update_packed`, the new tokens of the
    rows stand one behind the other. Memory is kept and grows with `reserve`.
    """

    def __init__(self, layers: int, heads: int, head_size: int, dtype: torch.dtype, device: torch.device) -> None:
        empty = torch.empty(0, heads, 0, head_size, dtype=dtype, device=device)
        self.keys, self.values = [empty] * layers, [empty] * layers
        self._rows, self._columns = slice(0, 0), slice(0, 0)
        self._starts: list[int] = []
        self._places: tuple[torch.Tensor, torch.Tensor] | None = None
        self._seen: dict[int | None, tuple[int, torch.Tensor | None]] = {}
        self._new: tuple[torch.Tensor, torch.Tensor] | None = None
        self._lengths: list[int] = []
        self._first_row = 0
        self._held: dict[int | None, tuple[Segments, tuple[torch.Tensor, torch.Tensor] | None]] = {}
        self.memory: dict[int, torch.Tensor] = {}
        """By row: the features [k, W] beside the text that its next token sees."""

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

    def extend(self, layers: int, heads: int, head_size: int) -> int:
        """Add layers of other heads before anything is stored; the index of the first one."""
        first, like = len(self.keys), self.keys[0]
        empty = like.new_empty(0, heads, 0, head_size)
        self.keys, self.values = [*self.keys, *[empty] * layers], [*self.values, *[empty] * layers]
        return first

    def begin(self, first_row: int, starts: list[int], length: int) -> None:
        """Announce `length` new tokens for each of the rows from `first_row` on, behind the `starts` [R] tokens that it
        holds. Surplus positions of a row that gets fewer tokens hold padding, which later tokens overwrite."""
        end = max(starts) + length
        self._check_end(end)
        self._rows, self._columns = slice(first_row, first_row + len(starts)), slice(max(starts), end)
        self._starts, self._places, self._seen = starts, None, {}
        if min(starts) < max(starts):
            device = self.keys[0].device
            rows = torch.arange(first_row, first_row + len(starts), device=device)[:, None]
            self._places = rows, self._positions()

    def _check_end(self, end: int) -> None:
        if end > self.length:
            raise ValueError(f"the cache holds {self.length} positions, position {end - 1} was asked for")

    def begin_packed(self, first_row: int, starts: Sequence[int], lengths: Sequence[int]) -> Segments:
        """Announce `lengths` [R] new tokens of the rows from `first_row` on, behind the `starts` [R] tokens that these
        hold, one row behind the other: the segments of the new tokens. Nothing waits for the device."""
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        self._check_end(max(ends))
        self._first_row, self._starts, self._lengths = first_row, list(starts), list(lengths)
        self._new = self._places_of(starts, ends)
        segments = Segments.of_lengths(lengths, self.keys[0].device)
        # Keys of sequences that hold nothing yet are the new ones, whatever the window.
        self._held = {} if any(starts) else {None: (segments, None)}
        return segments

    def _places_of(self, starts: Sequence[int], ends: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and positions [T] of the positions from `starts` [R] up to `ends` [R]."""
        spans = [torch.arange(*span) for span in zip(starts, ends, strict=True)]
        rows = [torch.full_like(span, row) for row, span in enumerate(spans, self._first_row)]
        device = self.keys[0].device
        found = (torch.cat(parts).to(device, non_blocking=True) for parts in (rows, spans))
        return next(found), next(found)

    def update_packed(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, window: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Segments]:
        """`update` behind `begin_packed`.

        Args:
            key, value: [T, G, D].
            window: see `update`.

        Returns:
            keys, values [K, G, D] of all that the new tokens may attend to, one row behind the other, and where the
            rows end there: the last of them are the new ones.
        """
        rows, positions = self._new
        for stored, new in ((self.keys[layer], key), (self.values[layer], value)):
            stored[rows, :, positions] = new
        segments, places = self._held_places(window)
        if places is None:
            return key, value, segments
        return self.keys[layer][places[0], :, places[1]], self.values[layer][places[0], :, places[1]], segments

    def _held_places(self, window: int | None) -> tuple[Segments, tuple[torch.Tensor, torch.Tensor] | None]:
        """Segments of the keys that some new token may attend to, and their rows and positions; None: the new ones.
        Made once for all layers with this window."""
        if not any(self._starts):
            window = None
        if window not in self._held:
            ends = [start + length for start, length in zip(self._starts, self._lengths, strict=True)]
            firsts = [0 if window is None else max(0, start + 1 - window) for start in self._starts]
            lengths = [end - first for first, end in zip(firsts, ends, strict=True)]
            segments = Segments.of_lengths(lengths, self.keys[0].device)
            self._held[window] = segments, self._places_of(firsts, ends)
        return self._held[window]

    def _positions(self) -> torch.Tensor:
        """Positions of the new tokens, [R or 1, S]."""
        device, length = self.keys[0].device, self._columns.stop - self._columns.start
        starts = self._starts if min(self._starts) < max(self._starts) else self._starts[:1]
        return torch.tensor(starts, device=device)[:, None] + torch.arange(length, device=device)

    def _visible(self, window: int | None) -> tuple[int, torch.Tensor | None]:
        """The first stored position that a new token may attend to, and the mask of those from there on: bool
        [R or 1, 1, S, K - first], or None (see `update`). Made once for all layers with this window."""
        if window not in self._seen:
            self._seen[window] = self._make_visible(window)
        return self._seen[window]

    def _make_visible(self, window: int | None) -> tuple[int, torch.Tensor | None]:
        start, end = self._columns.start, self._columns.stop
        length, uniform = end - start, self._places is None
        first = 0 if window is None else max(0, min(self._starts) + 1 - window)
        if uniform and length == 1:
            return first, None
        if uniform and length >= start:
            return 0, None
        positions = self._positions()[:, :, None] if uniform else self._places[1][:, :, None]
        stored = torch.arange(first, end, device=positions.device)
        mask = stored <= positions
        if window is not None:
            mask &= stored > positions - window
        return first, mask[:, None]

    def update(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, window: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Store the new keys and values of a layer and return all that the new tokens may attend to.

        Args:
            layer: index within this pipeline stage.
            key, value: [R, G, S, D].
            window: keys that the layer's queries see, their own among them; None: all.

        Returns:
            keys, values [R, G, K, D] and the mask [R or 1, 1, S, K], True = may attend. No mask: causal (and within the
            window), the last new token may attend to all. Where most of K is new, computing it all with a causal kernel
            beats a mask.
        """
        first, mask = self._visible(window)
        found = []
        for stored, new in ((self.keys[layer], key), (self.values[layer], value)):
            if self._places is None:
                stored[self._rows, :, self._columns] = new
            else:
                rows, positions = self._places
                stored[rows, :, positions] = new.transpose(1, 2)
            found.append(stored[self._rows, :, first : self._columns.stop])
        return found[0], found[1], mask

    def copy_rows(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy the first `length` positions of rows onto others, all at once (a row may be source and target)."""
        if not sources:
            return
        moved = [(row, self.memory.get(old)) for old, row in zip(sources, targets, strict=True)]
        self.memory |= {row: memory for row, memory in moved if memory is not None}
        for row, memory in moved:
            if memory is None:
                self.memory.pop(row, None)
        device = self.keys[0].device if self.keys else None
        source, target = torch.tensor(sources, device=device), torch.tensor(targets, device=device)
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[target, :, :length] = tensor[source, :, :length]
