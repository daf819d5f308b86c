"""LoRA on megatron.core's parallel linears. Each linear that Hugging Face has gets its own A and B, also in fused ones.

Legend: S sequence, B batch, T tensor-parallel size, r rank of the adapter.
A linear split by rows of its weight (column parallel) has a whole A and the rank's rows of B; one split by columns has
the rank's columns of A and a whole B. Only [S, B, r] values travel between the ranks.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.adapters.quantized_base import (
    QuantizedColumnLinear,
    QuantizedRowLinear,
    sharded_tensors,
    stored_pairs,
)
from mindspeed_mm.models.adapters.saved_values import values_in
from mindspeed_mm.models.adapters.spec import LoraSpec, WholePair
from mindspeed_mm.models.adapters.splits import local_a, local_b, local_geometry, places
from mindspeed_mm.models.adapters.targets import Site, sites
from mindspeed_mm.weights.loading import global_name
from mindspeed_mm.weights.rules import Geometry


class LoraPair(torch.nn.Module):
    """This rank's A and B of one linear. `places` are its rows in the output of a fused linear; None: it is all."""

    active = True

    def __init__(self, own: WholePair, rows: Tensor | None, scale: float, dropout: float) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Parameter(own.a), torch.nn.Parameter(own.b)
        self.register_parameter("m", None if own.m is None else torch.nn.Parameter(own.m))
        self.register_buffer("places", rows, persistent=False)
        self.scale, self.dropout = scale, dropout

    def dropped(self, x: Tensor, *, own_stream: bool) -> Tensor:
        """x with dropout; with `own_stream` each tensor-parallel rank draws by itself, since its values are its own."""
        if not (self.training and self.dropout):
            return x
        stream = tensor_parallel.get_cuda_rng_tracker().fork() if own_stream else contextlib.nullcontext()
        with stream:
            return F.dropout(x, self.dropout)


class RowOrder(NamedTuple):
    """How the rows of several linears, and those that have no adapter behind them, stand in a fused one."""

    others: int
    """Rows without an adapter."""
    ours: Tensor | None
    """The row of the fused linear for each joined one; None: both have one order."""
    theirs: Tensor | None
    """The way back."""

    @staticmethod
    def of(rows: list[Tensor], width: int) -> RowOrder:
        """`rows`: those of each linear in the fused one, which has `width`."""
        joined = torch.cat(rows)
        everything = torch.arange(width, device=joined.device)
        joined = torch.cat((joined, everything[torch.isin(everything, joined, invert=True)]))
        same = torch.equal(joined, everything)
        others = width - sum(map(len, rows))
        return RowOrder(others, None, None) if same else RowOrder(others, joined, joined.argsort())


class Reordered(torch.autograd.Function):
    """Other order of the last dimension. Both directions read by index; torch's own backward pass adds by index."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """x[..., order]"""
        ctx.inverse = inverse
        return x.index_select(-1, order)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The gradient in the order of x."""
        return gradient.index_select(-1, ctx.inverse), None, None


class AdaptedLinear(torch.nn.Module):
    """What both kinds of parallel linears do with their adapters."""

    lora: torch.nn.ModuleDict
    orders: dict[tuple, RowOrder]
    """Of the sets of pairs that were active so far."""
    blocks = 1
    """Equal blocks of rows that are each split over the ranks, where one A and B make all of them."""

    def forward(self, input_: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """[..., in] -> ([..., out], the bias to be added or None)."""
        output, bias = super().forward(input_, *args, **kwargs)
        pairs = {name: pair for name, pair in self.lora.items() if pair.active}
        if pairs:
            added = [self.added(pair, input_, output) for pair in pairs.values()]
            output = output + self._in_place(pairs, added, output.shape[-1])
        return output, bias

    def added(self, pair: LoraPair, input_: Tensor, output: Tensor) -> Tensor:
        """What a pair adds to its rows of the linear's own output."""
        delta = self.delta(pair, input_) * pair.scale
        return delta if pair.m is None else self.stretched(pair, output, delta)

    def _in_place(self, pairs: dict[str, LoraPair], added: list[Tensor], width: int) -> Tensor:
        """What the pairs add, at their rows of a fused linear, zero at the others: one addition then makes the sum, and
        nothing as wide as the output is kept for the backward pass."""
        rows = [pair.places for pair in pairs.values() if pair.places is not None]
        if not rows:
            return added[0]
        names = (*pairs, rows[0].device)
        if names not in self.orders:
            self.orders[names] = RowOrder.of(rows, width)
        order = self.orders[names]
        rest = [added[0].new_zeros(*added[0].shape[:-1], order.others)] if order.others else []
        joined = torch.cat((*added, *rest), dim=-1)
        return joined if order.theirs is None else Reordered.apply(joined, order.theirs, order.ours)

    def delta(self, pair: LoraPair, x: Tensor) -> Tensor:
        """B A x in the layout of the linear's output."""
        raise NotImplementedError

    def stretched(self, pair: LoraPair, output: Tensor, delta: Tensor) -> Tensor:
        """What is added instead of `delta` so that the rows of W + scale B A have the lengths m (DoRA). As its paper
        says, the lengths that they would have take no part in the gradient."""
        factor, bias = pair.m.float() / self.lengths(pair), None if self.skip_bias_add else self.bias
        if getattr(self, "gather_output", False):
            factor = tensor_parallel.gather_from_tensor_model_parallel_region(factor)
            bias = None if bias is None else tensor_parallel.gather_from_tensor_model_parallel_region(bias)
        plain = output if bias is None else output - bias
        plain = plain if pair.places is None else plain.index_select(-1, pair.places)
        return plain * (factor - 1).to(plain.dtype) + delta * factor.to(delta.dtype)

    @torch.no_grad()
    def lengths(self, pair: LoraPair) -> Tensor:
        """Lengths of this rank's rows of W + scale B A in float32, without making the sum: it is as large as W."""
        rows = slice(None) if pair.places is None else pair.places
        a, b = pair.a.float(), pair.scale * pair.b.float()
        squares = torch.linalg.vector_norm(self.weight, dim=1, dtype=torch.float32)[rows].square()
        mixed = F.linear(self.weight, pair.a)[rows].float()
        squares = squares + 2 * (mixed * b).sum(1) + ((b @ (a @ a.t())) * b).sum(1)
        if self.axes["weight"] == 1:  # each rank has some columns
            squares = tensor_parallel.reduce_from_tensor_model_parallel_region(squares)
        return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata=None) -> ShardedStateDict:
        """The linear's own tensors as before, and those of the adapters beside them."""
        axes = dict(self.axes)
        for name in self.lora:
            axes |= {f"lora.{name}.{which}": axis for which, axis in self.split.items()}
        split = [f"lora.{name}.{key}" for name, pair in self.lora.items() for key in pair.state_dict() if key != "a"]
        own = tuple(split) if self.blocks == 2 else ()
        return sharded_tensors(self, axes, (*stored_pairs(self), *own), prefix, sharded_offsets, metadata)


class LoraColumnLinear(AdaptedLinear, ColumnParallelLinear):
    """Split by rows of the weight."""

    axes, split = {"weight": 0, "bias": 0}, {"b": 0, "m": 0}

    def delta(self, pair: LoraPair, x: Tensor) -> Tensor:
        inner = F.linear(pair.dropped(x, own_stream=self.sequence_parallel), pair.a)
        if self.sequence_parallel:
            inner = tensor_parallel.gather_from_sequence_parallel_region(inner)
        else:
            inner = tensor_parallel.copy_to_tensor_model_parallel_region(inner)
        delta = F.linear(inner, pair.b)
        return tensor_parallel.gather_from_tensor_model_parallel_region(delta) if self.gather_output else delta


class LoraRowLinear(AdaptedLinear, RowParallelLinear):
    """Split by columns of the weight."""

    axes, split = {"weight": 1}, {"a": 1}

    def delta(self, pair: LoraPair, x: Tensor) -> Tensor:
        inner = F.linear(pair.dropped(x, own_stream=True), pair.a)
        if self.sequence_parallel:
            inner = tensor_parallel.reduce_scatter_to_sequence_parallel_region(inner)
        else:
            inner = tensor_parallel.reduce_from_tensor_model_parallel_region(inner)
        return F.linear(inner, pair.b)


class LoraQuantizedColumnLinear(LoraColumnLinear, QuantizedColumnLinear):
    """Beside a stored base."""

    axes = QuantizedColumnLinear.axes


class LoraQuantizedRowLinear(LoraRowLinear, QuantizedRowLinear):
    """Beside a stored base."""

    axes = QuantizedRowLinear.axes


ADAPTED = {
    QuantizedColumnLinear: LoraQuantizedColumnLinear,
    QuantizedRowLinear: LoraQuantizedRowLinear,
    ColumnParallelLinear: LoraColumnLinear,
    RowParallelLinear: LoraRowLinear,
}
"""The adapted kind of each linear; kinds come before those that they are made of."""


def attach_lora(
    module: torch.nn.Module,
    part: Any,
    spec: Any,
    *,
    tp_rank: int,
    tp_size: int,
    layer_offset: int = 0,
    pairs: dict[str, WholePair] | None = None,
) -> int:
    """Freeze a built part and give the linears that spec.lora names their adapters; returns how many this rank has.

    Args:
        module: the part on this pipeline stage, its base weights loaded already.
        tp_rank, tp_size, layer_offset: as in weights.loading.load_part.
        pairs: whole A and B by Hugging Face's name of the module, one for each target; None: A random, B zero, and
            DoRA's m the lengths of the weight's rows.

    Raises:
        ConfigError: a target has no pair or a pair of other shapes, or it is no linear of megatron.core.
    """
    module.requires_grad_(False)
    linears = {global_name(name, layer_offset): linear for name, linear in module.named_modules()}
    count = 0
    for owner, group in itertools.groupby(sites(part, spec), key=lambda site: site.owner):
        linear = linears.get(owner)
        if linear is None:  # on another pipeline stage
            continue
        if not isinstance(linear, ColumnParallelLinear | RowParallelLinear):
            raise ConfigError(
                f"{part.kind}.lora: {owner} is a {type(linear).__name__}; expected a parallel linear of megatron.core. "
                "Leave it out of target_modules"
            )
        for site in group:
            if pairs is None:
                whole = _first_pair(site, linear, spec.geometry, spec.lora)
            else:
                whole = _given_pair(site, linear, part, spec, pairs)
            _adapt(linear, site, whole, spec, tp_rank, tp_size)
            count += 1
    for block in module.modules():
        if count and isinstance(block, TransformerBlock) and _wake not in block._forward_pre_hooks.values():
            block.register_forward_pre_hook(_wake, with_kwargs=True)
    return count


@contextlib.contextmanager
def adapters_off(module: torch.nn.Module) -> Iterator[None]:
    """Inside, the module computes as if it had no adapters."""
    pairs = [pair for pair in module.modules() if isinstance(pair, LoraPair)]
    before, values = [pair.active for pair in pairs], [value for value in values_in(module) if value.active]
    for pair in pairs:
        pair.active = False
    for value in values:
        value.put(active=False)
    try:
        yield
    finally:
        for pair, active in zip(pairs, before, strict=True):
            pair.active = active
        for value in values:
            value.put(active=True)


def _adapt(linear: torch.nn.Module, site: Site, whole: WholePair, spec: Any, tp_rank: int, tp_size: int) -> None:
    """Turn a linear into the adapted kind of it, in place, so that its own tensors keep their names."""
    geometry, rule = spec.geometry, site.step.rule
    if not isinstance(linear, AdaptedLinear):
        linear.__class__ = next(adapted for kind, adapted in ADAPTED.items() if isinstance(linear, kind))
        linear.lora, linear.orders = torch.nn.ModuleDict(), {}
        linear.blocks = rule.blocks(geometry) if len(site.step.sources) == 1 else 1
    device, dtype = linear.weight.device, linear.config.params_dtype
    a = local_a(site, whole.a, tp_rank, tp_size).to(device, dtype, copy=True).contiguous()
    b = local_b(site, whole.b, geometry, tp_rank, tp_size).to(device, dtype, copy=True).contiguous()
    rows = places(site, linear.weight.shape[0], local_geometry(site, geometry, tp_size))
    m = None
    if spec.lora.use_dora:
        m = whole.m if whole.m is not None else torch.zeros(len(whole.b))
        m = local_b(site, m[:, None], geometry, tp_rank, tp_size)[:, 0].to(device, dtype, copy=True).contiguous()
    scale = spec.lora.scale_of(site.module)
    pair = LoraPair(WholePair(a, b, m), None if rows is None else rows.to(device), scale, spec.lora.dropout)
    if m is not None and whole.m is None:
        pair.m.data.copy_(linear.lengths(pair))
    if m is not None and rule.axis == 0:
        tensor_parallel.set_tensor_model_parallel_attributes(pair.m, True, 0, 1)
    elif m is not None:
        pair.m.sequence_parallel = linear.sequence_parallel
    if rule.axis == 0:
        tensor_parallel.set_tensor_model_parallel_attributes(pair.b, True, 0, 1)
        pair.a.sequence_parallel = linear.sequence_parallel
    else:
        tensor_parallel.set_tensor_model_parallel_attributes(pair.a, True, 1, 1)
        pair.b.sequence_parallel = linear.sequence_parallel
    linear.lora[site.short] = pair.train(linear.training)


def _sizes(site: Site, linear: torch.nn.Module, geometry: Geometry) -> tuple[int, int]:
    """(out, in) of the whole linear of a site."""
    rows = places(site, linear.output_size, geometry)
    return linear.output_size if rows is None else len(rows), linear.input_size


def _first_pair(site: Site, linear: torch.nn.Module, geometry: Geometry, lora: LoraSpec) -> WholePair:
    """A as PEFT draws it (uniform within 1 / sqrt(in)), from a seed of its own for each name, and B of zeros."""
    outputs, inputs = _sizes(site, linear, geometry)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{lora.init_seed} {site.module}".encode()))
    bound = 1 / math.sqrt(inputs)
    rank = lora.rank_of(site.module)
    a = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
    return WholePair(a, torch.zeros(outputs, rank))


def _given_pair(site: Site, linear: torch.nn.Module, part: Any, spec: Any, pairs: dict[str, WholePair]) -> WholePair:
    if site.module not in pairs:
        raise ConfigError(
            f"{part.kind}.lora: the adapter that is loaded has no A and B of {site.module}, which target_modules "
            "names. Give the target_modules that it was trained with"
        )
    a, b, _ = pairs[site.module]
    (outputs, inputs), rank = _sizes(site, linear, spec.geometry), spec.lora.rank_of(site.module)
    if tuple(a.shape) != (rank, inputs) or tuple(b.shape) != (outputs, rank):
        raise ConfigError(
            f"{part.kind}.lora: A and B of {site.module} have shapes {list(a.shape)} and {list(b.shape)}; expected "
            f"{[rank, inputs]} and {[outputs, rank]}. The adapter belongs to another base model or has "
            "another r"
        )
    return pairs[site.module]


def _wake(block: TransformerBlock, args: tuple, kwargs: dict) -> None:
    """Everything below the first adapter is frozen, so the hidden states that come in need no gradient. Recomputation
    and the pipeline's backward pass start from them all the same."""
    config = block.config
    if config.recompute_granularity != "full" and config.pipeline_model_parallel_size == 1:
        return
    hidden = args[0] if args else kwargs["hidden_states"]
    if hidden is not None and torch.is_grad_enabled() and block.training and not hidden.requires_grad:
        hidden.requires_grad_()
