"""Weights in 4 or 8 bits, in blocks that share one scale: plain torch, the same on every device.

nf4: 16 levels that are equally likely under a normal distribution (Dettmers et al. 2023, appendix E), two in a byte,
the first in the upper half. fp4: floats of a sign, two bits of exponent and one of mantissa. int8: whole steps of the
largest value / 127. A block is BLOCK values of one row, so that a tensor-parallel rank's slice of whole blocks is
stored as the whole weight is.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64
"""Values that share a scale: QLoRA's block."""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The published levels, of a block whose largest absolute value is 1."""

_FP4_TWELFTHS = (0, 0.0625, 8, 12, 4, 6, 2, 3)
FP4 = tuple(sign * level / 12 for sign in (1, -1) for level in _FP4_TWELFTHS)
"""Level of each code: the upper bit is the sign."""

LEVELS = {"nf4": NF4, "fp4": FP4}
KINDS = (*LEVELS, "int8")


class Blocks(NamedTuple):
    """A stored weight [out, in]."""

    codes: Tensor
    """nf4, fp4: uint8 [out, in / 2]; int8: int8 [out, in]."""
    scales: Tensor
    """[out, in / BLOCK] float32: the largest absolute value of each block."""


class StoredForm(NamedTuple):
    """A weight as it lies in a checkpoint."""

    kind: str
    tensors: dict[str, Tensor]
    """codes, scales and with double quantisation ranges -> whole tensors; float32 ones as integers of the same bits."""


def stored_form(weight: Tensor, kind: str, axis: int, *, small_scales: bool) -> StoredForm:
    """A weight [out, in] as it is stored, of a linear that tensor parallelism splits along `axis`."""
    stored = quantize(weight, kind)
    tensors = {"codes": stored.codes, "scales": stored.scales.view(torch.int32)}
    if small_scales:
        small = shrink_scales(stored.scales, axis)
        tensors |= {"scales": small.codes, "ranges": small.ranges.view(torch.int32)}
    return StoredForm(kind, tensors)


def stored_shapes(
    shape: Sequence[int], kind: str, axis: int, *, small_scales: bool
) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
    """Names of the tensors of a stored weight [out, in] -> (shape, type)."""
    rows, columns = shape
    whole = kind == "int8"
    shapes = {
        "codes": ((rows, columns if whole else columns // 2), torch.int8 if whole else torch.uint8),
        "scales": ((rows, columns // BLOCK), torch.uint8 if small_scales else torch.int32),
    }
    if small_scales:
        size = (rows, 2) if axis == 0 else (2 * -(-rows // GROUP), columns // BLOCK)
        shapes["ranges"] = (size, torch.int32)
    return shapes


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
    borders, code_of = _borders(kind, weight.device)
    levels = code_of[torch.bucketize(normed, borders)]
    return Blocks(levels[:, ::2] << 4 | levels[:, 1::2], scales)


def dequantize(stored: Blocks, kind: str, dtype: torch.dtype) -> Tensor:
    """The weight [out, in], computed in float32 and rounded once; 4 bits by bitsandbytes' kernel where it is installed,
    which gives the same values."""
    codes, scales = stored
    kernel = _kernel() if kind in LEVELS and codes.device.type in ("cpu", "cuda") else None
    if kernel is not None:
        shape = [codes.shape[0], 2 * codes.shape[1]]
        return kernel(codes.reshape(-1, 1), scales.reshape(-1), BLOCK, kind, shape, dtype)
    return plain_values(stored, kind, dtype)


def plain_values(stored: Blocks, kind: str, dtype: torch.dtype) -> Tensor:
    """What `dequantize` gives, in torch alone."""
    codes, scales = stored
    rows = codes.shape[0]
    values = codes.float().div_(127) if kind == "int8" else _pairs(kind, codes.device)[codes.int()]
    return values.view(rows, -1, BLOCK).mul_(scales[..., None]).view(rows, -1).to(dtype)


class SmallScales(NamedTuple):
    """Scales [out, blocks] in 8 bits each: QLoRA's second quantisation.

    Its own groups are 256 scales of the whole weight in a row, which a tensor-parallel rank's slice would cut
    elsewhere. Ours lie along the axis that is not split: a weight split by rows has a group for each row, one split by
    columns GROUP rows of each column of blocks. A group is stored between its lowest and highest scale in 255 equal
    steps; the highest is exact.
    """

    codes: Tensor
    """uint8 [out, blocks]."""
    ranges: Tensor
    """float32: lowest, then highest scale. [out, 2], or [2 x groups, blocks]."""


GROUP = 256
"""Rows whose scales share a range, in a weight that is split by columns."""


def shrink_scales(scales: Tensor, axis: int) -> SmallScales:
    """Scales [out, blocks] in 8 bits, of a weight that tensor parallelism splits along `axis`."""
    groups = [scales.t()] if axis == 0 else scales.split(GROUP)
    ranges = torch.cat([torch.stack(torch.aminmax(group, dim=0)) for group in groups])
    ranges = ranges.t().contiguous() if axis == 0 else ranges
    low, high = _ends(ranges, scales.shape[0], axis)
    span = (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    return SmallScales(((scales - low) / span * 255).round().to(torch.uint8), ranges)


def whole_scales(small: SmallScales, axis: int) -> Tensor:
    """The scales [out, blocks] in float32 that 8 bits stand for."""
    low, high = _ends(small.ranges, small.codes.shape[0], axis)
    return high - (high - low) * ((255 - small.codes.float()) / 255)


def stored_scales(stored: Sequence[Tensor], axis: int) -> Tensor:
    """Scales [out, blocks] of a weight split along `axis`, from what is stored of them: integers of the same bits, or
    8 bits of each and the ranges' bits."""
    if len(stored) == 1:
        return stored[0].view(torch.float32)
    return whole_scales(SmallScales(stored[0], stored[1].view(torch.float32)), axis)


def _ends(ranges: Tensor, rows: int, axis: int) -> tuple[Tensor, Tensor]:
    """(lowest, highest) of the group of each scale, to be broadcast against [out, blocks]."""
    if axis == 0:
        return ranges[:, :1], ranges[:, 1:]
    low, high = ranges.view(-1, 2, ranges.shape[1]).repeat_interleave(GROUP, 0)[:rows].unbind(1)
    return low, high


MADE = 6
"""Bytes of an element while a weight is made whole: float32, and the index or the result beside it."""


def bytes_of(elements: float, kind: str, *, small_scales: bool = False) -> float:
    """Bytes of a stored weight; with `small_scales` without the few bytes of the ranges."""
    return elements * ((1.0 if kind == "int8" else 0.5) + (1 if small_scales else 4) / BLOCK)


@functools.lru_cache
def _pairs(kind: str, device: torch.device) -> Tensor:
    """[256, 2]: the two levels that a byte stands for."""
    levels = torch.tensor(LEVELS[kind])
    return torch.cartesian_prod(levels, levels).to(device)


@functools.lru_cache
def _borders(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Half-way between neighbouring levels, and the code of each level in their order. fp4 has two zeros."""
    levels, code_of = torch.tensor(LEVELS[kind], dtype=torch.float64).sort(stable=True)
    return ((levels[1:] + levels[:-1]) / 2).float().to(device), code_of.to(device, torch.uint8)


@functools.lru_cache
def _kernel() -> Callable[..., Tensor] | None:
    """bitsandbytes' function that makes weights of 4 bits whole; None where it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports kernels that it might download
    importlib.import_module("bitsandbytes")
    return torch.ops.bitsandbytes.dequantize_4bit
