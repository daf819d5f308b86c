"""megatron.core's SelfAttention with a forward pass of the few steps that this suite needs.

Legend: S sequence, B batch, G key/value heads of this tensor-parallel rank, A query heads of each, D head size.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import attention

from mindspeed_mm.models.kit.attention import Scope, ScopedSegments
from mindspeed_mm.models.kit.norm import Norm
from mindspeed_mm.platform import current_platform
from mindspeed_mm.platform.segments import Segments


class SelfAttention(attention.SelfAttention):
    """Projection, norms of queries and keys where there are any, rotary embedding, core attention, projection, and a
    norm behind it where `post_norm` is set."""

    def __init__(
        self,
        *args,
        post_norm: bool = False,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
        scope: Scope | None = None,
        alibi_bias_max: float | None = None,
        **kwargs,
    ) -> None:
        """`scale` (None: D ** -0.5), `window` and `soft_cap` are those of Platform.attention, `scope` that of
        CoreAttention, `alibi_bias_max` that of its `use_alibi` (None: no ALiBi)."""
        super().__init__(*args, **kwargs)
        self.platform = current_platform()
        config, core = self.config, self.core_attention
        core.scale = core.scale if scale is None else scale
        core.window, core.soft_cap, core.scope = window, soft_cap, scope
        if alibi_bias_max is not None:
            core.use_alibi(alibi_bias_max)
        self.post_layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon) if post_norm else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotary_pos_emb: torch.Tensor | None = None,
        packed_seq_params: Segments | ScopedSegments | None = None,
        **_unused,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            hidden_states: [S, B, H].
            attention_mask: see CoreAttention.
            rotary_pos_emb: cosines and sines of RotaryEmbedding.cos_sin, or None where positions are embedded.

        Returns:
            [S, B, H] and the bias to be added, or None.
        """
        groups, size = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        heads = self.num_attention_heads_per_partition
        qkv, _ = self.linear_qkv(hidden_states)
        if self.config.qk_layernorm:
            qkv = self._normed(qkv, groups, heads // groups, size)
        if rotary_pos_emb is not None:
            qkv = self.platform.rotate_qk(qkv, *rotary_pos_emb, groups, size)
        qkv = qkv.view(*qkv.shape[:2], groups, heads // groups + 2, size)
        query, key, value = qkv.split((heads // groups, 1, 1), dim=3)
        query, key, value = query.flatten(2, 3), key.squeeze(3), value.squeeze(3)
        if self.checkpoint_core_attention and self.training:
            output = self._checkpointed_attention_forward(
                query, key, value, attention_mask, packed_seq_params=packed_seq_params
            )
        else:
            output = self.core_attention(query, key, value, attention_mask, packed_seq_params=packed_seq_params)
        output, bias = self.linear_proj(output)
        return (output if self.post_layernorm is None else self.post_layernorm(output)), bias

    def _normed(self, qkv: torch.Tensor, groups: int, per_group: int, size: int) -> torch.Tensor:
        """[S, B, G (A + 2) D] with each query head and each key head normed over its D channels."""
        heads = qkv.view(*qkv.shape[:2], groups, per_group + 2, size)
        query, key, value = heads.split((per_group, 1, 1), dim=3)
        return torch.cat((self.q_layernorm(query), self.k_layernorm(key), value), dim=3).flatten(2)
