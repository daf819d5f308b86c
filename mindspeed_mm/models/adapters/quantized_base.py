"""Frozen parallel linears whose weights are stored in 4 or 8 bits (QLoRA).

A weight is made whole for each product, and again for the gradient of its input: only the stored bytes are kept. Each
tensor-parallel rank stores its own rows or columns, in blocks that lie inside a row (weights/blockwise.py). So the
stored values are the same at every layout.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.autograd.function import once_differentiable

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.adapters.targets import all_sites
from mindspeed_mm.platform.host_linear import multiply
from mindspeed_mm.weights.blockwise import BLOCK, Blocks, dequantize, quantize
from mindspeed_mm.weights.loading import global_name

logger = logging.getLogger(__name__)

MIB = 2**20


class _Product(torch.autograd.Function):
    """x [..., in] times the transpose of a stored weight [out, in]."""

    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, scales: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.kind = kind
        return _times(x, _whole(codes, scales, kind, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        weight = _whole(*ctx.saved_tensors, ctx.kind, grad.dtype)
        return _times(grad, weight.t()), None, None, None


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times the transpose of weight [out, in], by the kernel that the host has measured to be fastest."""
    return multiply(x, weight) if x.device.type == "cpu" else F.linear(x, weight)


def _whole(codes: Tensor, scales: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    return dequantize(Blocks(codes, scales.view(torch.float32)), kind, dtype)


class _QuantizedLinear(torch.nn.Module):
    """What both kinds of parallel linears share."""

    kind: str
    stored_blocks = 1
    """Equal blocks of rows that are each split over the ranks (gate and up)."""

    @property
    def weight(self) -> Tensor:
        """The stored bytes."""
        return self.codes

    def product(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] of this rank."""
        return _Product.apply(x, self.codes, self.scales, self.kind)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata=None) -> ShardedStateDict:
        """Codes, scales and the bias."""
        return sharded_tensors(self, self.axes, stored_pairs(self), prefix, sharded_offsets, metadata)


def stored_pairs(linear: torch.nn.Module) -> tuple[str, ...]:
    """The stored tensors of a linear that hold gate above up on each rank."""
    return ("codes", "scales") if getattr(linear, "stored_blocks", 1) == 2 else ()


def sharded_tensors(
    linear: torch.nn.Module,
    axes: dict[str, int],
    pairs: tuple[str, ...],
    prefix: str,
    sharded_offsets: tuple,
    metadata: dict[str, Any],
) -> ShardedStateDict:
    """The tensors of a parallel linear for a checkpoint: split along `axes`; `pairs` are those whose rows on a rank are
    its share of two blocks, which a whole tensor has one above the other."""
    groups = {"tp_group": linear.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
    state = linear.state_dict(prefix="", keep_vars=True)
    tensors = make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets, **groups)
    for key in (prefix + name for name in pairs):
        tensors[key] = apply_swiglu_sharded_factory(tensors[key], sharded_offsets)
    return tensors


class QuantizedColumnLinear(_QuantizedLinear, ColumnParallelLinear):
    """Split by rows of the weight."""

    axes = {"codes": 0, "scales": 0, "bias": 0}

    def forward(self, input_: Tensor, weight: None = None, *unused: Any) -> tuple[Tensor, Tensor | None]:
        """[..., in] -> ([..., out], the bias to be added or None)."""
        if self.sequence_parallel:
            x = tensor_parallel.gather_from_sequence_parallel_region(input_)
        else:
            x = tensor_parallel.copy_to_tensor_model_parallel_region(input_)
        output = self.product(x)
        if self.bias is not None and not self.skip_bias_add:
            output = output + self.bias
        if self.gather_output:
            output = tensor_parallel.gather_from_tensor_model_parallel_region(output)
        return output, self.bias if self.skip_bias_add else None


class QuantizedRowLinear(_QuantizedLinear, RowParallelLinear):
    """Split by columns of the weight."""

    axes = {"codes": 1, "scales": 1}

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., in of this rank] -> ([..., out], the bias to be added or None)."""
        output = self.product(input_)
        if self.sequence_parallel:
            output = tensor_parallel.reduce_scatter_to_sequence_parallel_region(output)
        else:
            output = tensor_parallel.reduce_from_tensor_model_parallel_region(output)
        if self.bias is not None and not self.skip_bias_add:
            output = output + self.bias
        return output, self.bias if self.skip_bias_add else None


def quantize_linears(module: torch.nn.Module, part: Any, spec: Any, layer_offset: int = 0) -> None:
    """Store the linears of a built part's layers as spec.quantize says, where they are; embeddings, norms and the head
    stay. Logs the bytes.

    Raises:
        ConfigError: a linear whose columns on this rank are no whole blocks.
    """
    sites = {site.owner: site for site in all_sites(part, spec)}
    before = after = 0
    for name, linear in list(module.named_modules()):
        site = sites.get(global_name(name, layer_offset))
        if site is None or not isinstance(linear, ColumnParallelLinear | RowParallelLinear):
            continue
        before += linear.weight.numel() * linear.weight.element_size()
        rule = site.step.rule
        _store(linear, spec.quantize, name, rule.blocks(spec.geometry) if rule.axis == 0 else 1)
        after += sum(tensor.numel() * tensor.element_size() for tensor in (linear.codes, linear.scales))
    logger.info("%s in %s: %.1f MiB, before %.1f MiB", part.kind, spec.quantize, after / MIB, before / MIB)


def _store(linear: torch.nn.Module, kind: str, name: str, blocks: int) -> None:
    """Turn a linear into the stored kind of it, in place."""
    weight = linear.weight
    if weight.shape[1] % BLOCK:
        raise ConfigError(
            f"quantize {kind}: {name} has {weight.shape[1]} columns on a rank; expected a multiple of {BLOCK}, the "
            "values that share a scale. Lower --tensor-model-parallel-size, or leave the part unquantised"
        )
    stored = quantize(weight, kind)
    del linear.weight
    linear.__class__ = QuantizedColumnLinear if isinstance(linear, ColumnParallelLinear) else QuantizedRowLinear
    linear.kind, linear.stored_blocks = kind, blocks
    # As integers, which no cast of the module to a half precision rounds.
    for key, tensor in (("codes", stored.codes), ("scales", stored.scales.view(torch.int32))):
        linear.register_parameter(key, torch.nn.Parameter(tensor, requires_grad=False))
    linear.codes.logical_numel, linear.scales.logical_numel = weight.numel(), 0
