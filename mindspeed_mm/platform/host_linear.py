"""Matrix products on the CPU by oneDNN, in float32 as exact as torch's own, which are MKL's.

On processors of AMD, MKL does not use AVX-512: oneDNN's kernels take half the time there (docs/performance.md). torch
reaches them through the operator behind torch.compile's linear layers; small products are left to MKL, which starts
faster.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

LEAST_WORK = 4_000_000
"""Multiply-adds from which oneDNN's kernel is faster, its start included."""

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight^T + bias without autograd: [..., K], [N, K], [N] or None -> [..., N]."""
    work = x.numel() * weight.shape[0]
    if _HAS_ONEDNN and work >= LEAST_WORK and x.dtype == weight.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """Of [M, K] rows. A frozen weight needs no input for its gradient, so none is kept."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            multiply(grad, weight.t()) if wants_x else None,
            multiply(grad.t(), x.t()) if wants_weight else None,
            grad.sum(0) if wants_bias else None,
        )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight^T + bias with autograd: [..., K], [N, K], [N] or None -> [..., N]."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        rows = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
        return rows.view(*x.shape[:-1], weight.shape[0])
    return multiply(x, weight, bias)
