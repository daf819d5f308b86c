"""Frozen parallel linears whose weights are stored in 4 or 8 bits (QLoRA).

A weight is made whole for each product, and again for the gradient of its input: only the stored bytes are kept. Each
tensor-parallel rank stores its own rows or columns, in blocks that lie inside a row (weights/blockwise.py). So the
stored values are the same at every layout. Weights are stored one by one as they are read, in host memory: the device
never holds a whole one that nobody computes with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
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
from mindspeed_mm.weights.blockwise import (
    BLOCK,
    Blocks,
    StoredForm,
    dequantize,
    stored_form,
    stored_scales,
    stored_shapes,
)
from mindspeed_mm.weights.loading import global_name

logger = logging.getLogger(__name__)

MIB = 2**20


class _Product(torch.autograd.Function):
    """x [..., in] times the transpose of a stored weight [out, in]."""

    @staticmethod
    def forward(ctx, x: Tensor, kind: str, axis: int, *stored: Tensor) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.kind, ctx.axis = kind, axis
        return _times(x, _whole(stored, kind, axis, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        weight = _whole(ctx.saved_tensors, ctx.kind, ctx.axis, grad.dtype)
        return _times(grad, weight.t()), None, None, *[None] * len(ctx.saved_tensors)


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times the transpose of weight [out, in], by the kernel that the host has measured to be fastest."""
    return multiply(x, weight) if x.device.type == "cpu" else F.linear(x, weight)


def _whole(stored: Sequence[Tensor], kind: str, axis: int, dtype: torch.dtype) -> Tensor:
    return dequantize(Blocks(stored[0], stored_scales(stored[1:], axis)), kind, dtype)


class _QuantizedLinear(torch.nn.Module):
    """What both kinds of parallel linears share."""

    kind: str
    stored: tuple[str, ...]
    """Names of what is stored, in the order of `_whole`."""
    stored_blocks = 1
    """Equal blocks of rows that are each split over the ranks (gate and up)."""

    @property
    def weight(self) -> Tensor:
        """The stored bytes."""
        return self.codes

    def product(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] of this rank."""
        return _Product.apply(x, self.kind, self.axes["codes"], *(getattr(self, name) for name in self.stored))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata=None) -> ShardedStateDict:
        """Codes, scales and the bias."""
        return sharded_tensors(self, self.axes, stored_pairs(self), prefix, sharded_offsets, metadata)


def stored_pairs(linear: torch.nn.Module) -> tuple[str, ...]:
    """The stored tensors of a linear that hold gate above up on each rank."""
    return linear.stored if getattr(linear, "stored_blocks", 1) == 2 else ()


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

    axes = {"codes": 0, "scales": 0, "ranges": 0, "bias": 0}

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

    axes = {"codes": 1, "scales": 1, "ranges": 1}

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


class StoredWeight:
    """The place of a weight [out, in] of this rank that is stored as it is copied into, where a parameter would stand.
    The linear has no bytes of it before."""

    def __init__(self, linear: torch.nn.Module, kind: str, *, small_scales: bool) -> None:
        weight = linear.weight
        self.shape, self._dtype = weight.shape, weight.dtype
        self._linear, self._kind, self._small_scales = linear, kind, small_scales

    def copy_(self, value: Tensor) -> None:
        """Store a weight, as the parameter's type would round it."""
        axis = self._linear.axes["codes"]
        self._put(stored_form(value.to(self._dtype), self._kind, axis, small_scales=self._small_scales).tensors)

    def take_stored(self, form: StoredForm, share: Callable[[Tensor], Tensor]) -> bool:
        """Take a whole weight that is stored already, of which `share` gives this rank's; False where it is stored in
        another way."""
        if form.kind != self._kind or ("ranges" in form.tensors) != self._small_scales:
            return False
        self._put({name: share(tensor) for name, tensor in form.tensors.items()})
        return True

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            getattr(self._linear, name).data = tensor.contiguous()

    def make_room(self) -> None:
        """Give the linear its stored tensors, as integers, which no cast of the module to a half precision rounds.
        Their values are those of nothing."""
        linear = self._linear
        shapes = stored_shapes(self.shape, self._kind, linear.axes["codes"], small_scales=self._small_scales)
        linear.stored = tuple(shapes)
        for name, (size, dtype) in shapes.items():
            tensor = torch.nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
            tensor.logical_numel = self.shape.numel() if name == "codes" else 0
            linear.register_parameter(name, tensor)


def store_linears(
    module: torch.nn.Module, part: Any, spec: Any, layer_offset: int = 0, *, keep: bool
) -> dict[str, StoredWeight]:
    """Turn the linears of a built part's layers into stored ones, as spec.quantize says, where they are; embeddings,
    norms and the head stay. Logs the bytes.

    Args:
        keep: store the values that the linears have; else they hold nothing yet.

    Returns:
        The places of the weights by the module's names of them, for `load_part`.

    Raises:
        ConfigError: a linear whose columns on this rank are no whole blocks.
    """
    sites = {site.owner: site for site in all_sites(part, spec)}
    places: dict[str, StoredWeight] = {}
    before = after = 0
    for name, linear in list(module.named_modules()):
        site = sites.get(global_name(name, layer_offset))
        if site is None or not isinstance(linear, ColumnParallelLinear | RowParallelLinear):
            continue
        before += linear.weight.numel() * linear.weight.element_size()
        rule = site.step.rule
        linear.stored_blocks = rule.blocks(spec.geometry) if rule.axis == 0 else 1
        places[f"{name}.weight"] = _store(linear, spec, name, keep=keep)
        after += sum(getattr(linear, key).numel() * getattr(linear, key).element_size() for key in linear.stored)
    logger.info("%s in %s: %.1f MiB, before %.1f MiB", part.kind, spec.quantize, after / MIB, before / MIB)
    return places


def loading_state(module: torch.nn.Module, places: dict[str, StoredWeight]) -> dict[str, Tensor | StoredWeight]:
    """The tensors of a module by the names of its weight rules: places where a weight is stored in another form."""
    hidden = {f"{name.removesuffix('weight')}{key}" for name in places for key in ("codes", "scales", "ranges")}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in hidden} | places


def mark_split(module: torch.nn.Module, part: Any, spec: Any, layer_offset: int = 0) -> None:
    """Tell megatron.core which parameters tensor parallelism splits, of a part that it built without first values."""
    rules = {step.target: step.rule for step in part.rules["ours"].steps(spec.geometry)}
    for name, parameter in module.named_parameters():
        rule = rules.get(global_name(name, layer_offset))
        if rule is not None and rule.axis is not None and not hasattr(parameter, "tensor_model_parallel"):
            tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, rule.axis, 1)


def _store(linear: torch.nn.Module, spec: Any, name: str, *, keep: bool) -> StoredWeight:
    """Turn a linear into the stored kind of it, in place."""
    weight, kind = linear.weight, spec.quantize
    if weight.shape[1] % BLOCK:
        raise ConfigError(
            f"quantize {kind}: {name} has {weight.shape[1]} columns on a rank; expected a multiple of {BLOCK}, the "
            "values that share a scale. Lower --tensor-model-parallel-size, or leave the part unquantised"
        )
    place = StoredWeight(linear, kind, small_scales=spec.double_quant)
    del linear.weight
    linear.__class__ = QuantizedColumnLinear if isinstance(linear, ColumnParallelLinear) else QuantizedRowLinear
    linear.kind = kind
    place.make_room()
    if keep:
        place.copy_(weight.detach())
    return place
