"""Core attention for megatron.core layer specs: the platform's kernel, no dense causal masks, an optional KV cache.

Legend: S query length, K key length, B batch, H heads, G key/value heads (of this tensor-parallel rank), D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from mindspeed_mm.models.kit.alibi import CHANNELS, Alibi, slopes
from mindspeed_mm.models.kit.context import heads_to_sequence, repeat_groups, sequence_to_heads
from mindspeed_mm.models.kit.kv_cache import KVCache
from mindspeed_mm.platform import current_platform
from mindspeed_mm.platform.capped import band
from mindspeed_mm.platform.segments import BranchedSegments, Segments

Scope = Literal["items", "windows"]
"""Which of an encoder's ScopedSegments a layer attends inside of."""


@dataclass(frozen=True)
class ScopedSegments:
    """Two ways of cutting the patches of an encoder."""

    items: Segments
    """Images, or frames of videos."""
    windows: Segments


class CoreAttention(MegatronModule):
    """softmax(QK^T / sqrt(D)) V on what megatron.core's SelfAttention hands over.

    kit/self_attention.py sets `scale`, `window` and `soft_cap` where a decoder has its own, and `scope` in the layers
    of an encoder that takes ScopedSegments.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        attention_dropout: float | None = None,
        **_unused,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.causal = attn_mask_type == AttnMaskType.causal
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.window: int | None = None
        self.soft_cap: float | None = None
        self.scope: Scope | None = None
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.platform = current_platform()
        parallel = config.context_parallel_size > 1
        self.context_group = parallel_state.get_context_parallel_group() if parallel else None
        self.cache: KVCache | None = None
        self.cache_layer = 0
        self.alibi: Alibi | None = None

    def use_alibi(self, bias_max: float) -> None:
        """Add ALiBi's bias, whose slopes `bias_max` says, to the scores of this rank's heads."""
        group = self.context_group
        parts = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
        if group is not None:  # whose ranks share out the heads of a tensor-parallel rank
            parts, rank = parts * group.size(), rank * group.size() + group.rank()
        heads = self.config.num_attention_heads
        own = heads // parts
        self.alibi = Alibi(slopes(heads, bias_max)[rank * own : (rank + 1) * own], self.scale)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Segments | ScopedSegments | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [S, B, H, D]; key, value: [K, B, G, D], already rotated; under context parallelism this rank's slices
                of S and K, while the mask is that of the whole sequence.
            attention_mask: bool [B or 1, 1, S, K], True = may attend, complete (causality included, a window not), or
                None: causal for a decoder, everything for a vision encoder.
            packed_seq_params: the sequences of the only row (B is 1): attention inside each, with a cache behind what
                it holds of them (see its `begin_packed`); None: rows are sequences. The name is megatron.core's.

        Returns:
            [S, B, H * D]
        """
        if attention_bias is not None:
            raise ValueError("attention_bias is not supported by this attention module")
        group = self.context_group
        if group is not None:
            key, value = (repeat_groups(x, group.size()) for x in (key, value))
            query, key, value = (heads_to_sequence(x, group) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        options = {"scale": self.scale, "dropout": dropout, "window": self.window, "soft_cap": self.soft_cap}
        if packed_seq_params is not None:
            output = self._packed(query, key, value, packed_seq_params, options)
            return (output if group is None else sequence_to_heads(output, group)).flatten(2)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask, held = attention_mask, 0
        if mask is not None and self.window is not None:
            mask = mask & band(range(mask.shape[2]), range(mask.shape[3]), self.window, mask.device)
        if self.cache is not None:
            key, value, mask = self.cache.update(self.cache_layer, key, value, self.window)
            if mask is None and query.shape[2] > 1:
                held = key.shape[2] - query.shape[2]
                # Causal kernels want S = K: some queries go in twice (S >= held), and the first results are dropped.
                query = torch.cat((query[:, :, :held], query), dim=2)
        if self.alibi is not None:
            query, key, value = self.alibi.extend(query, key, value)
        output = self.platform.attention(
            query,
            key,
            value,
            mask=mask,
            # A single new token behind a cache may see all of it.
            causal=self.causal and mask is None and query.shape[2] == key.shape[2],
            **options,
        )
        output = self._own_channels(output[:, :, held:] if held else output).permute(2, 0, 1, 3)
        return (output if group is None else sequence_to_heads(output, group)).flatten(2)

    def _packed(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: Segments | ScopedSegments,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """[S, 1, H, D]: attention inside each sequence of the only row."""
        rows = (x.squeeze(1) for x in (query, key, value))
        segments = packed if self.scope is None else getattr(packed, self.scope)
        if self.cache is not None:
            return self._own_channels(self._continued(*rows, segments, options)).unsqueeze(1)
        if self.alibi is not None:
            rows = self.alibi.extend(*rows, segments)
        if isinstance(segments, BranchedSegments):
            output = self.platform.branch_attention(*rows, segments, **options)
        else:
            output = self.platform.segment_attention(*rows, segments, causal=self.causal, **options)
        return self._own_channels(output).unsqueeze(1)

    def _continued(self, query, key, value, segments: Segments, options: dict[str, Any]) -> torch.Tensor:
        """[T, H, D (+ C)]: the new tokens [T, H or G, D] of the cache's rows, without dropout."""
        key, value, held = self.cache.update_packed(self.cache_layer, key, value, self.window)
        if self.alibi is not None:
            query, key, value = self.alibi.extend(query, key, value, held)
        options = {name: options[name] for name in ("scale", "window", "soft_cap")}
        return self.platform.continued_attention(query, key, value, segments, held, **options)

    def _own_channels(self, output: torch.Tensor) -> torch.Tensor:
        """[..., D] of what attention returns."""
        return output if self.alibi is None else output[..., :-CHANNELS]
