"""Linear layers on the CPU, by the kernels that host_products chose for this processor."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from mindspeed_mm.platform import host_products

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = host_products.FORMS


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight^T + bias without autograd: [..., K], [N, K], [N] or None -> [..., N]."""
    rows = x.numel() // max(1, x.shape[-1])
    return _product(FORWARD, x, weight, bias, rows, x.shape[-1], weight.shape[0])


def _product(
    form: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: int, inner: int, outer: int
) -> torch.Tensor:
    # oneDNN refuses products without rows, which a rank without labels has.
    if x.device.type != "cpu" or x.dtype != weight.dtype or not x.numel() or not weight.numel():
        return host_products.run(host_products.PLAIN, x, weight, bias)
    return host_products.run(host_products.choose(form, x.dtype, rows, inner, outer), x, weight, bias)


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
        sizes = grad.shape[0], weight.shape[1], weight.shape[0]
        return (
            _product(INPUT_GRADIENT, grad, weight.t(), None, *sizes) if wants_x else None,
            _product(WEIGHT_GRADIENT, grad.t(), x.t(), None, *sizes) if wants_weight else None,
            grad.sum(0) if wants_bias else None,
        )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight^T + bias with autograd: [..., K], [N, K], [N] or None -> [..., N]."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        rows = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
        return rows.view(*x.shape[:-1], weight.shape[0])
    return multiply(x, weight, bias)
