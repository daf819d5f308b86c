"""The post-interaction block's module, on megatron.core's parallel linears.

Legend: n text positions, S of each of B rows, F features, W their width, H width of the decoder, D channels of a head.
"""

from __future__ import annotations

import copy

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from mindspeed_mm.models.interaction_memory import Memory, TextView
from mindspeed_mm.models.kit.attention import CoreAttention
from mindspeed_mm.models.kit.kv_cache import KVCache
from mindspeed_mm.models.kit.layer_list import LayerList
from mindspeed_mm.models.kit.linears import Linears
from mindspeed_mm.models.kit.perceiver import UnbiasedMLP, unbiased_column, unbiased_row
from mindspeed_mm.models.runtime import Runtime, encoder_config
from mindspeed_mm.platform import current_platform


class PostBlock(MegatronModule):
    """Layers of attention and MLP, each added to its input. The attention is to an image's features, to the text, or
    not there.

    Every tensor-parallel rank has all positions: the head's hidden states are gathered before. A layer's last linears
    begin at zero, so that the block is the identity, unless its spec asks for the original's doubled residual.
    """

    def __init__(self, spec, runtime: Runtime) -> None:
        config = encoder_config(spec, runtime)
        super().__init__(config=config)
        self.doubled, self.memory_norm = spec.doubled_residual, None
        self.reads_text: bool = spec.self_attention
        """Whether it wants all positions of a text at once (`over_text`), not single ones."""
        if spec.cross_attention:
            align = copy.copy(config)
            align.activation_func, align.output_layer_init_method = torch.nn.functional.gelu, config.init_method
            self.align = Linears(align, spec.align_sizes)
            self.memory_norm = torch.nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        inner = copy.copy(config)
        inner.output_layer_init_method = config.init_method if self.doubled else torch.nn.init.zeros_
        inner.context_parallel_size = runtime.context_parallel_size  # whose ranks hold slices of the text
        layers = (PostLayer(inner, spec, number) for number in range(config.num_layers))
        self.blocks = LayerList(config, layers)

    def forward(self, hidden: torch.Tensor, memory: Memory) -> torch.Tensor:
        """[n, H] -> [n, H] of a block that does not read the text; `memory.seen` is [n, 2] here."""
        if self.memory_norm is None:
            return self._added(hidden, self.blocks(hidden))
        values = self.memory_norm(self.align(memory.values))
        return self._added(hidden, self.blocks(hidden, values, _Groups(memory.seen, hidden.device)))

    def over_text(self, hidden: torch.Tensor, view: TextView) -> torch.Tensor:
        """[S, B, H] -> [S, B, H] of one that does."""
        return self._added(hidden, self.blocks(hidden, view))

    def _added(self, hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return output + hidden if self.doubled else output

    def extend(self, cache: KVCache) -> int:
        """Give a cache room for keys and values of layers that read the text; the number of the first one in it."""
        heads = self.config.num_attention_heads // self.config.tensor_model_parallel_size
        return cache.extend(len(self.blocks.layers), heads, self.config.kv_channels)

    def use_cache(self, cache: KVCache | None, first: int = 0) -> None:
        """Attend to the text through `cache`, whose layers from `first` on are the block's, or not at all (None)."""
        for number, layer in enumerate(self.blocks.layers, start=first):
            core = layer.self_attention.core_attention
            core.cache, core.cache_layer = cache, number


class PostLayer(MegatronModule):
    """Attention, where there is one, and MLP, each behind a norm and added to its input."""

    def __init__(self, config: TransformerConfig, spec, number: int) -> None:
        super().__init__(config=config)
        self.cross_attention = FeatureAttention(config) if spec.cross_attention else None
        self.self_attention = TextAttention(config, number) if spec.self_attention else None
        self.mlp = UnbiasedMLP(config)

    def forward(self, hidden: torch.Tensor, *sight) -> torch.Tensor:
        """[n, H] -> [n, H] with features [F, H] and their _Groups; [S, B, H] -> [S, B, H] with a TextView."""
        attention = self.cross_attention or self.self_attention
        if attention is not None:
            hidden = hidden + attention(hidden, *sight)
        return hidden + self.mlp(hidden)


class PostAttention(MegatronModule):
    """The norm and the linears of both kinds of attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        width = config.hidden_size
        self.norm = torch.nn.LayerNorm(width, eps=config.layernorm_epsilon)
        self.linear_q, self.linear_k, self.linear_v = (unbiased_column(config, width, width) for _ in range(3))
        self.linear_proj = unbiased_row(config, width, width)


class TextAttention(PostAttention):
    """Each position asks, those up to itself answer; without rotary positions, which the states have been through."""

    def __init__(self, config: TransformerConfig, number: int) -> None:
        super().__init__(config)
        self.core_attention = CoreAttention(config, number + 1, AttnMaskType.causal)

    def forward(self, hidden: torch.Tensor, view: TextView) -> torch.Tensor:
        """[S, B, H] -> [S, B, H]"""
        states, channels = self.norm(hidden), self.config.kv_channels
        heads = (
            linear(states)[0].unflatten(-1, (-1, channels)) for linear in (self.linear_q, self.linear_k, self.linear_v)
        )
        return self.linear_proj(self.core_attention(*heads, view.mask, packed_seq_params=view.segments))[0]


class FeatureAttention(PostAttention):
    """Positions ask, the features that they see answer; a position that sees none gets zero."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.platform = current_platform()

    def forward(self, hidden: torch.Tensor, memory: torch.Tensor, groups: _Groups) -> torch.Tensor:
        """[n, H], [F, H] -> [n, H]"""
        channels = self.config.kv_channels
        query, key, value = self.linear_q(self.norm(hidden))[0], self.linear_k(memory)[0], self.linear_v(memory)[0]
        pieces = []
        for (start, end), own in zip(groups.ranges, groups.sorted(query).split(groups.counts), strict=True):
            if start == end:
                pieces.append(torch.zeros_like(own))
                continue
            heads = (
                x.unflatten(-1, (-1, channels)).transpose(0, 1)[None] for x in (own, key[start:end], value[start:end])
            )
            found = self.platform.attention(*heads, mask=None, causal=False, scale=channels**-0.5, dropout=0.0)
            pieces.append(found[0].transpose(0, 1).flatten(1))
        if groups.sees_nothing:  # every rank runs the same backward pass; the gradients are exact zeros
            pieces += [query[:0], key[:0], value[:0]]
        return self.linear_proj(groups.restored(torch.cat(pieces)))[0]


class _Groups:
    """Positions that see the same features, together, so that attention needs no mask."""

    def __init__(self, seen: torch.Tensor, device: torch.device) -> None:
        """`seen`: [n, 2] int64, first feature and the one behind the last of each position."""
        ranges, group, counts = torch.unique(seen, dim=0, return_inverse=True, return_counts=True)
        self.ranges: list[list[int]] = ranges.tolist()
        self.counts: list[int] = counts.tolist() or [0]
        self.ranges = self.ranges or [[0, 0]]
        self.sees_nothing = all(start == end for start, end in self.ranges)
        self._order = self._back = None
        if len(self.ranges) > 1:
            order = group.argsort(stable=True)
            self._order, self._back = (x.to(device, non_blocking=True) for x in (order, order.argsort()))

    def sorted(self, values: torch.Tensor) -> torch.Tensor:
        """[n, ...] with the positions of a group together."""
        return values if self._order is None else values[self._order]

    def restored(self, values: torch.Tensor) -> torch.Tensor:
        """[n, ...] in the positions' own order again."""
        return values if self._back is None else values[self._back]
