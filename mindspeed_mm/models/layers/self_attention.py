"""megatron.core's SelfAttention with a forward pass of the few steps that this suite needs.

Legend: S sequence, B batch, G key/value heads of this tensor-parallel rank, A query heads of each, D head size.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import attention

from mindspeed_mm.platform import current_platform
from mindspeed_mm.platform.segments import Segments


class SelfAttention(attention.SelfAttention):
    """Projection, rotary embedding, core attention, projection. Norms of queries and keys are not supported."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.platform = current_platform()

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotary_pos_emb: torch.Tensor | None = None,
        packed_seq_params: Segments | None = None,
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
        if rotary_pos_emb is not None:
            qkv = self.platform.rotate_qk(qkv, *rotary_pos_emb, groups)
        qkv = qkv.view(*qkv.shape[:2], groups, heads // groups + 2, size)
        query, key, value = qkv.split((heads // groups, 1, 1), dim=3)
        query, key, value = query.flatten(2, 3), key.squeeze(3), value.squeeze(3)
        if self.checkpoint_core_attention and self.training:
            output = self._checkpointed_attention_forward(
                query, key, value, attention_mask, packed_seq_params=packed_seq_params
            )
        else:
            output = self.core_attention(query, key, value, attention_mask, packed_seq_params=packed_seq_params)
        return self.linear_proj(output)
