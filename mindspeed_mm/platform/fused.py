"""Operations of a transformer layer that autograd would take apart, with their derivatives written out.

Autograd keeps what each elementary step of a formula needs: these keep the inputs of the formula only and compute the
rest again, which costs less time than the memory traffic saved. They are made of torch operations and run on any
device; a platform with a kernel of its own takes that instead.

Legend: H channels, S sequence, B rows, G groups, A query heads of a group, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class FusedRMSNorm(torch.autograd.Function):
    """y = x r w with r = 1 / sqrt(mean(x^2) + eps); keeps x and r."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [..., H], weight [H] -> [..., H]; statistics in float32."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple:
        """With g the gradient and m = mean(g w x) r^2: dx = r (g w - x m), dw = sum over positions of g x r."""
        x, weight, scale = ctx.saved_tensors
        size = x.shape[-1]
        grad, wide = grad.float(), x.float()  # once each: every operation of mixed dtypes would cast them anew
        product = grad * wide
        mean = (product @ weight.float()).unsqueeze(-1).mul_(scale.square()).div_(size)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (scale.reshape(1, -1) @ product.reshape(-1, size)).view(size).to(weight.dtype)
        grad_x = torch.mul(grad, weight, out=product).addcmul_(wide, mean, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020) of one tensor [..., gate | up]; keeps that tensor only."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        """[..., 2F] -> [..., F]"""
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        """d up = silu(gate) g; d gate = silu'(gate) up g."""
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        result = torch.empty_like(x)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=grad_up).mul_(grad)
        torch.mul(grad, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return result


class GeGLU(torch.autograd.Function):
    """gelu(gate) * up (Shazeer 2020), gelu in its tanh form, of one tensor [..., gate | up]; keeps that tensor only."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        """[..., 2F] -> [..., F]"""
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh").mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        """d up = gelu(gate) g; d gate = gelu'(gate) up g."""
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        result = torch.empty_like(x)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        torch.mul(F.gelu(gate, approximate="tanh"), grad, out=grad_up)
        torch.ops.aten.gelu_backward.grad_input(grad * up, gate, approximate="tanh", grad_input=grad_gate)
        return result


class RotateQK(torch.autograd.Function):
    """Rotary embedding (half-split) of the queries and keys in a joint projection; keeps the angles only."""

    @staticmethod
    def forward(
        ctx, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, groups: int, head_size: int | None = None
    ) -> torch.Tensor:
        """qkv [S, B, G (A + 2) D]; cos, sin [S, B or 1, 1, 1, R / 2] for the first R of the D channels (None: all)."""
        ctx.save_for_backward(cos, sin)
        ctx.shape = (groups, head_size)
        return _rotate_qk(qkv, cos, sin, groups, head_size)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        """The rotation backwards."""
        cos, sin = ctx.saved_tensors
        return _rotate_qk(grad, cos, -sin, *ctx.shape), None, None, None, None


def _rotate_qk(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, groups: int, head_size: int | None
) -> torch.Tensor:
    result = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    rotated = 2 * cos.shape[-1]
    head_size = head_size or rotated
    old, new = (x.view(*x.shape[:2], groups, -1, head_size) for x in (qkv, result))
    first, second = old[..., :-1, :rotated].chunk(2, dim=-1)
    new_first, new_second = new[..., :-1, :rotated].chunk(2, dim=-1)
    torch.mul(first, cos, out=new_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=new_second).addcmul_(first, sin)
    if rotated < head_size:
        new[..., :-1, rotated:] = old[..., :-1, rotated:]
    new[..., -1, :] = old[..., -1, :]
    return result
