"""ALiBi (Press et al. 2022): each head adds slope * (key position - query position) to its scores.

Softmax does not see what all keys of a query have in common, so that slope * (key position) is enough. This is a
product of numbers of the head and numbers of the key: as further channels of queries and keys it goes through any
kernel, without a mask of [heads, queries, keys].

Legend: H heads, K keys, D head size, C the further channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from mindspeed_mm.platform.segments import BranchedSegments, Segments

CHANNELS = 8
"""C: four are used; kernels in half precision want multiples of eight."""

STEP = 256
"""Positions are split into two parts that are whole in bfloat16: multiples of this, and the rest."""


def slopes(heads: int, bias_max: float) -> list[float]:
    """The slope of each head as MPT has them: powers of 2 ** (-bias_max / heads); where `heads` is no power of two,
    every second one of the next power's, beginning with the second, and then the others."""
    whole = 2 ** math.ceil(math.log2(heads))
    found = [2.0 ** (-bias_max * number / whole) for number in range(1, whole + 1)]
    return found if whole == heads else (found[1::2] + found[::2])[:heads]


class Alibi:
    """The further channels of some heads."""

    def __init__(self, head_slopes: list[float], scale: float) -> None:
        """`scale` is the kernel's factor on the scores."""
        self._factors = torch.tensor(head_slopes, dtype=torch.float64) / scale

    def _of_heads(self, like: torch.Tensor) -> torch.Tensor:
        """[H, C] in the dtype of `like`: the factor in two parts, so that half precision has no other slope."""
        coarse = self._factors.to(like.dtype)
        fine = (self._factors - coarse.double()).to(like.dtype)
        parts = torch.stack((coarse * STEP, fine * STEP, coarse, fine), dim=1)
        return F.pad(parts, (0, CHANNELS - 4)).to(like.device, non_blocking=True)

    @staticmethod
    def _of_keys(places: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """[K] -> [K, C] in the dtype of `like`."""
        coarse, fine = places // STEP, places % STEP
        return F.pad(torch.stack((coarse, coarse, fine, fine), dim=1).to(like.dtype), (0, CHANNELS - 4))

    def extend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and keys with the further channels, values with as many zeros.

        Args:
            query, key, value: [B, H or G, S or K, D]; with `segments` [T, H or G, D].

        Returns:
            The same with D + C channels; the last C of what attention makes of them are to be dropped.
        """
        heads, value = self._of_heads(query), F.pad(value, (0, CHANNELS))
        if segments is None:
            keys = self._of_keys(torch.arange(key.shape[2], device=key.device), key)
            heads, keys = heads[None, :, None], keys[None, None]
        else:
            keys = self._of_keys(segment_places(segments, key.device), key)
            heads, keys = heads[None], keys[:, None]
        extended = (torch.cat((x, more.expand(*x.shape[:-1], -1)), dim=-1) for x, more in ((query, heads), (key, keys)))
        return *extended, value


def segment_places(segments: Segments, device: torch.device) -> torch.Tensor:
    """Position of each token in its sequence, [T] int64; every branch continues the beginning that it shares."""
    runs = [(0, length) for length in segments.lengths]
    if isinstance(segments, BranchedSegments):
        runs = []
        for shared, *branches in segments.branches:
            runs += [(0, shared), *((shared, shared + length) for length in branches)]
    return torch.cat([torch.arange(*run, device=device) for run in runs])
