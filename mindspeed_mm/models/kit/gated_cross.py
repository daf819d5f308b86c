"""Flamingo's gated cross-attention in front of decoder layers, on megatron.core's parallel linears.

Legend: S sequence, B batch, H width of the decoder, M media of a row, L features of a medium, K = M * L, W their width.
"""

from __future__ import annotations

import copy

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from mindspeed_mm.models.kit.add_norm import Layer
from mindspeed_mm.models.kit.cross_spec import EXPANSION, CrossAttentionSpec
from mindspeed_mm.models.kit.perceiver import UnbiasedMLP, keys_and_values, unbiased_column, unbiased_row
from mindspeed_mm.platform import current_platform

EPSILON = 1e-5
"""Of the norms; open_flamingo takes torch's default."""


class GatedCrossBlock(MegatronModule):
    """Attention to features and an MLP, each times the tanh of a gate that begins at zero, and added to its input."""

    def __init__(self, config: TransformerConfig, cross: CrossAttentionSpec) -> None:
        config = copy.copy(config)
        config.ffn_hidden_size, config.layernorm_epsilon = EXPANSION * config.hidden_size, EPSILON
        config.activation_func = torch.nn.functional.gelu
        super().__init__(config=config)
        whole = copy.copy(config)  # the features are whole on every rank
        whole.sequence_parallel = False
        size, width = cross.num_attention_heads * cross.kv_channels, config.hidden_size
        self.channels = cross.kv_channels
        self.attention_norm = torch.nn.LayerNorm(width, eps=EPSILON)
        self.linear_q = unbiased_column(config, width, size)
        self.linear_kv = keys_and_values(whole, cross.memory_size, size)
        self.linear_proj = unbiased_row(config, size, width)
        self.mlp = UnbiasedMLP(config)
        self.attention_gate = torch.nn.Parameter(torch.zeros(1))
        self.mlp_gate = torch.nn.Parameter(torch.zeros(1))
        norms = (self.attention_norm.parameters(), self.mlp.norm.parameters())
        for parameter in (self.attention_gate, self.mlp_gate, *norms[0], *norms[1]):
            parameter.sequence_parallel = config.sequence_parallel
        self.platform = current_platform()

    def forward(
        self, hidden: torch.Tensor, memory: torch.Tensor | None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend.

        Args:
            hidden: [S, B, H], under sequence parallelism this rank's share.
            memory: [K, B, W] features; None: there is no medium, and the MLP alone changes the text, as before a
                medium.
            mask: bool [B, 1, S, K] of `media_mask`.

        Returns:
            [S, B, H]
        """
        if memory is not None:
            hidden = hidden + self._attend(hidden, memory, mask) * self.attention_gate.tanh()
        return hidden + self.mlp(hidden) * self.mlp_gate.tanh()

    def _attend(self, hidden: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query, (key, value) = self.linear_q(self.attention_norm(hidden))[0], self.linear_kv(memory)[0].chunk(2, dim=-1)
        heads = (x.unflatten(-1, (-1, self.channels)).permute(1, 2, 0, 3) for x in (query, key, value))
        sees = mask.any(dim=-1, keepdim=True)
        # A softmax over nothing is NaN in some kernels: who sees nothing attends to all, and the result is left out.
        output = self.platform.attention(
            *heads, mask=mask | ~sees, causal=False, scale=self.channels**-0.5, dropout=0.0
        )
        output = output.masked_fill(~sees, 0.0)
        return self.linear_proj(output.permute(2, 0, 1, 3).flatten(2))[0]


class GatedLayer(Layer):
    """A decoder layer behind gated cross-attention. megatron.core hands on `context`, the features, and its mask."""

    def __init__(self, *args, cross: CrossAttentionSpec, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.gated_cross = GatedCrossBlock(self.config, cross)

    def forward(self, hidden_states: torch.Tensor, *args, context=None, context_mask=None, **kwargs):
        """As TransformerLayer."""
        hidden_states = self.gated_cross(hidden_states, context, context_mask)
        output, _ = super().forward(hidden_states, *args, **kwargs)
        return output, context
