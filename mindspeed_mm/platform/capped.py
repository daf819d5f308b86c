"""Attention whose scores are capped, cap * tanh(score / cap) (Gemma 2), which no fused kernel of torch computes.

Written out in blocks of queries: the scores of a block exist at a time, and once more in the backward pass. A sliding
window takes the keys that a block can see and no others.

Legend: B batch, H heads, G key/value heads, S query length, K key length, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

BLOCK_SCORES = 2**24
"""Scores that exist at a time, at most: 64 MiB in float32."""


def band(queries: range, keys: range, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [queries, keys], True where a query may attend to a key: not behind it, and among the last `window` ones."""
    distance = torch.arange(queries.start, queries.stop, device=device)[:, None] - torch.arange(
        keys.start, keys.stop, device=device
    )
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


class _Block(NamedTuple):
    """A block of queries and the keys that it looks at."""

    queries: slice
    keys: slice
    seen: torch.Tensor | None
    """bool, broadcast over [B, H, queries, keys], True = may attend; None: all."""


class CappedAttention(torch.autograd.Function):
    """softmax(cap tanh(scale QK^T / cap)) V; keeps its inputs, its output and the log-sum of each row."""

    @staticmethod
    def forward(
        ctx,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
        scale: float,
        cap: float,
        window: int | None,
    ) -> torch.Tensor:
        """See Platform.attention; `window` counts where `causal` is True."""
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        for block in _blocks(query, key, mask, causal, window):
            scores = _hide(_raw(query, key, block).mul_(scale / cap).tanh_().mul_(cap), block)
            sums[:, :, block.queries] = scores.logsumexp(-1)
            weights = scores.sub_(sums[:, :, block.queries, None]).exp_()
            output[:, :, block.queries] = _product(weights.to(value.dtype), value[:, :, block.keys])
        ctx.save_for_backward(query, key, value, mask, output, sums)
        ctx.options = (causal, scale, cap, window)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple:
        """With P the weights, T the tanh: dV = P^T g, dS = P (g V^T - rowsum(g O)) (1 - T^2) scale."""
        query, key, value, mask, output, sums = ctx.saved_tensors
        causal, scale, cap, window = ctx.options
        grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        grad_key, grad_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
        means = (grad.float() * output).sum(-1, keepdim=True)
        for block in _blocks(query, key, mask, causal, window):
            capped = _raw(query, key, block).mul_(scale / cap).tanh_()
            weights = _hide(capped * cap, block).sub_(sums[:, :, block.queries, None]).exp_()
            own, keys = grad[:, :, block.queries], key[:, :, block.keys]
            grad_value[:, :, block.keys] += _sum_groups(weights.to(grad.dtype), own, key.shape[1])
            change = _raw(grad, value, block).sub_(means[:, :, block.queries]).mul_(weights)
            change = change.mul_(1 - capped.square_()).mul_(scale).to(query.dtype)
            grad_query[:, :, block.queries] = _product(change, keys)
            grad_key[:, :, block.keys] += _sum_groups(change, query[:, :, block.queries], key.shape[1])
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None, None, None


def _blocks(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, causal: bool, window: int | None
) -> Iterator[_Block]:
    rows, heads, length, _ = query.shape
    end = key.shape[2]
    size = max(1, BLOCK_SCORES // (rows * heads * end))
    for first in range(0, length, size):
        last = min(first + size, length)
        if not causal:
            yield _Block(slice(first, last), slice(0, end), None if mask is None else mask[:, :, first:last])
            continue
        begin = 0 if window is None else max(0, first + 1 - window)
        seen = band(range(first, last), range(begin, last), window, query.device)
        yield _Block(slice(first, last), slice(begin, last), seen)


def _raw(query: torch.Tensor, key: torch.Tensor, block: _Block) -> torch.Tensor:
    """Products of the block's queries with its keys, [B, H, queries, keys] float32."""
    return _product(query[:, :, block.queries], key[:, :, block.keys].transpose(2, 3)).float()


def _hide(scores: torch.Tensor, block: _Block) -> torch.Tensor:
    return scores if block.seen is None else scores.masked_fill_(~block.seen, float("-inf"))


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[B, H, n, m] @ [B, G, m, k] -> [B, H, n, k]; the heads of a group share the right side, which is not repeated."""
    rows, heads, length, width = left.shape
    groups = right.shape[1]
    joined = left.reshape(rows, groups, heads // groups * length, width) @ right
    return joined.view(rows, heads, length, right.shape[3])


def _sum_groups(left: torch.Tensor, right: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, H, n, m]^T @ [B, H, n, k], summed over the heads of each group -> [B, G, m, k]."""
    rows, heads, length, width = left.shape
    left = left.reshape(rows, groups, heads // groups * length, width)
    right = right.reshape(rows, groups, heads // groups * length, right.shape[3])
    return left.transpose(2, 3) @ right
