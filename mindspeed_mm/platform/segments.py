"""Sequences that stand one behind the other in one row, for attention that stays inside each of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Segments:
    """Where the sequences of a row end. Attention over them takes memory of order T, a mask would take T^2."""

    ends: tuple[int, ...]
    """Position behind the last token of each sequence, on the host; the last one is the row's length T."""
    offsets: torch.Tensor
    """[number + 1] int32 on the device: 0 and the ends (cu_seqlens of the attention kernels)."""
    longest: int

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device) -> Segments:
        """Segments of the given lengths, each at least 1."""
        ends, end = [], 0
        for length in lengths:
            end += length
            ends.append(end)
        offsets = torch.tensor([0, *ends], dtype=torch.int32).to(device, non_blocking=True)
        return cls(tuple(ends), offsets, max(lengths))

    @property
    def lengths(self) -> list[int]:
        """Of each sequence."""
        return [end - start for start, end in itertools.pairwise((0, *self.ends))]

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Neighbours of one length together: that length, and how many they are."""
        return [(length, len(list(group))) for length, group in itertools.groupby(self.lengths)]

    @property
    def slices(self) -> list[slice]:
        """One for each sequence."""
        return [slice(start, end) for start, end in itertools.pairwise((0, *self.ends))]


@dataclass(frozen=True)
class BranchedSegments(Segments):
    """Sequences that may part into branches: all of a sequence's branches continue what it begins with, and a branch
    attends to that beginning and to itself."""

    branches: tuple[tuple[int, ...], ...]
    """Lengths of each sequence: of its shared beginning (it may be 0), then of each branch, at least one."""

    @classmethod
    def of_branches(cls, branches: Sequence[Sequence[int]], device: torch.device) -> BranchedSegments:
        """Sequences of the given lengths one behind the other. `longest` is the longest beginning with one branch."""
        plain = Segments.of_lengths([sum(lengths) for lengths in branches], device)
        longest = max(lengths[0] + max(lengths[1:]) for lengths in branches)
        return cls(plain.ends, plain.offsets, longest, tuple(tuple(lengths) for lengths in branches))
