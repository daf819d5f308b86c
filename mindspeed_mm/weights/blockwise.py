"""Weights in 4 or 8 bits, in blocks that share one scale: plain torch, the same on every device.

nf4: 16 levels that are equally likely under a normal distribution (Dettmers et al. 2023, appendix E), two in a byte,
the first in the upper half. int8: whole steps of the largest value / 127. A block is BLOCK values of one row, so that a
tensor-parallel rank's slice of whole blocks is stored as the whole weight is.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("nf4", "int8")
BLOCK = 64
"""Values that share a scale: QLoRA's block."""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The published levels, of a block whose largest absolute value is 1."""


class Blocks(NamedTuple):
    """A stored weight [out, in]."""

    codes: Tensor
    """nf4: uint8 [out, in / 2]; int8: int8 [out, in]."""
    scales: Tensor
    """[out, in / BLOCK] float32: the largest absolute value of each block."""


def quantize(weight: Tensor, kind: str) -> Blocks:
    """A weight [out, in] of any floating type in blocks. Raises ValueError for an `in` that is no multiple of BLOCK."""
    rows, columns = weight.shape
    if columns % BLOCK:
        raise ValueError(f"found a weight of {columns} columns; expected a multiple of {BLOCK}, the values of a block")
    blocks = weight.detach().float().view(rows, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax(-1)
    normed = (blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).view(rows, columns)
    if kind == "int8":
        return Blocks((normed * 127).round().to(torch.int8), scales)
    levels = torch.bucketize(normed, _borders(weight.device)).to(torch.uint8)
    return Blocks(levels[:, ::2] << 4 | levels[:, 1::2], scales)


def dequantize(stored: Blocks, kind: str, dtype: torch.dtype) -> Tensor:
    """The weight [out, in], computed in float32 and rounded once."""
    codes, scales = stored
    rows = codes.shape[0]
    values = codes.float().div_(127) if kind == "int8" else _pairs(codes.device)[codes.int()]
    return values.view(rows, -1, BLOCK).mul_(scales[..., None]).view(rows, -1).to(dtype)


MADE = 6
"""Bytes of an element while a weight is made whole: float32, and the index or the result beside it."""


def bytes_of(elements: float, kind: str) -> float:
    """Bytes of a stored weight."""
    return elements * ((0.5 if kind == "nf4" else 1.0) + 4 / BLOCK)


@functools.lru_cache
def _pairs(device: torch.device) -> Tensor:
    """[256, 2]: the two levels that a byte stands for."""
    return torch.cartesian_prod(torch.tensor(NF4), torch.tensor(NF4)).to(device)


@functools.lru_cache
def _borders(device: torch.device) -> Tensor:
    """Half-way between neighbouring levels."""
    levels = torch.tensor(NF4, dtype=torch.float64)
    return ((levels[1:] + levels[:-1]) / 2).float().to(device)
