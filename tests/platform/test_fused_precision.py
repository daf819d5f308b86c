"""No lever of the training step loses precision: errors against float64 beside those of plain torch.

Why the quickstart's accuracy moved between versions was asked of these operations (docs/performance.md, Accuracy).
"""

import pytest
import torch
import torch.nn.functional as F

from mindspeed_mm.platform import fused, host_products

ROOM = 1.25
"""Times plain torch's error that an operation may have."""
ROUNDINGS = 4 * torch.finfo(torch.float32).eps
"""Relative error that float32 sums in another order may have (measured: 1.8 eps, and 2.4 eps of a product)."""


def plain_rms_norm(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight, eps)


def plain_swiglu(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def plain_geglu(x):
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def plain_rotation(qkv, cos, sin, groups):
    heads = qkv.view(*qkv.shape[:2], groups, -1, 2 * cos.shape[-1])
    first, second = heads[..., :-1, :].chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned, heads[..., -1:, :]), dim=3).flatten(2)


def rms_norm_inputs():
    return (torch.randn(40, 3, 128) * 3, 1 + 0.3 * torch.randn(128)), (1e-5,)


def gated_inputs():
    return (torch.randn(40, 3, 256) * 2,), ()


def rotation_inputs():
    angles = torch.rand(40, 1, 1, 1, 8) * 40
    return (torch.randn(40, 3, 2 * 4 * 16), angles.cos(), angles.sin()), (2,)


OPERATIONS = {
    "RMSNorm": (fused.FusedRMSNorm.apply, plain_rms_norm, rms_norm_inputs, 2),
    "SwiGLU": (fused.SwiGLU.apply, plain_swiglu, gated_inputs, 1),
    "GeGLU": (fused.GeGLU.apply, plain_geglu, gated_inputs, 1),
    "rotation": (fused.RotateQK.apply, plain_rotation, rotation_inputs, 1),
}


def errors(operation, tensors, others, learned, dtype, exact):
    """Root mean square error of the output and of each gradient, relative to the exact one's."""
    found = []
    for got, wanted in zip(results(operation, tensors, others, learned, dtype), exact, strict=True):
        found.append(((got.double() - wanted).square().mean() / wanted.square().mean()).sqrt().item())
    return found


def results(operation, tensors, others, learned, dtype):
    copies = [tensor.to(dtype).requires_grad_(index < learned) for index, tensor in enumerate(tensors)]
    output = operation(*copies, *others)
    torch.manual_seed(5)
    gradient = torch.randn(output.shape).bfloat16()
    return [output.detach(), *torch.autograd.grad(output, copies[:learned], gradient.to(output.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_letter_i_errors_are_those_of_plain_torch(name, dtype):
    operation, plain, inputs, learned = OPERATIONS[name]
    torch.manual_seed(4)
    tensors, others = inputs()
    tensors = [tensor.to(dtype) for tensor in tensors]  # both begin at the same rounded values
    exact = results(plain, tensors, others, learned, torch.float64)
    ours = errors(operation, tensors, others, learned, dtype, exact)
    torchs = errors(plain, tensors, others, learned, dtype, exact)
    for our, theirs in zip(ours, torchs, strict=True):
        assert our <= max(ROOM * theirs, ROUNDINGS), (ours, torchs)


@pytest.mark.parametrize("kernel", host_products.KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, inner, outer", [(96, 128, 512), (2100, 256, 128)])
def test_letter_i_products_are_as_exact_by_every_kernel(rows, inner, outer, dtype, kernel):
    torch.manual_seed(6)
    x, weight = torch.randn(rows, inner).to(dtype), torch.randn(outer, inner).to(dtype)
    exact = x.double() @ weight.double().t()

    def error(product):
        return ((product.double() - exact).square().mean() / exact.square().mean()).sqrt().item()

    assert error(host_products.run(kernel, x, weight)) <= max(ROOM * error(F.linear(x, weight)), ROUNDINGS)
