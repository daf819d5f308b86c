"""Context parallelism after Ulysses (Jacobs et al. 2023): every rank holds a slice of the sequence, and attention
exchanges heads for sequence, so that any attention kernel sees whole sequences.

Legend: S sequence, B batch, H heads, D head size, C context-parallel size.
"""

from __future__ import annotations

import math

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import all_to_all
from torch.distributed import ProcessGroup


def sequence_slice(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """This rank's S/C positions of a whole tensor, contiguous along `dim`; the tensor itself where C is 1.

    Raises:
        ValueError: S is no multiple of C.
    """
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return tensor
    if tensor.shape[dim] % size:
        raise ValueError(
            f"a sequence of {tensor.shape[dim]} positions cannot be split over context-parallel size {size}: "
            "pad the batch to a multiple of it"
        )
    return tensor.chunk(size, dim)[parallel_state.get_context_parallel_rank()]


def heads_to_sequence(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """All heads of a slice -> a share of the heads of the whole sequence, [S/C, B, H, D] -> [S, B, H/C, D]."""
    size = group.size()
    length, rows, heads, channels = x.shape
    by_rank = x.view(length, rows, size, heads // size, channels).permute(2, 0, 1, 3, 4).contiguous()
    return all_to_all(group, by_rank).flatten(0, 1)


def sequence_to_heads(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """The way back, [S, B, H/C, D] -> [S/C, B, H, D]."""
    size = group.size()
    by_rank = x.contiguous().view(size, x.shape[0] // size, *x.shape[1:])
    return all_to_all(group, by_rank).permute(1, 2, 0, 3, 4).flatten(2, 3)


def repeat_groups(x: torch.Tensor, size: int) -> torch.Tensor:
    """Repeat key/value heads [S, B, G, D] as often as `size` ranks need to share them evenly."""
    times = size // math.gcd(x.shape[2], size)
    return x if times == 1 else x.repeat_interleave(times, dim=2)
