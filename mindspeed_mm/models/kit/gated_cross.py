"""Flamingo's gated cross-attention in front of decoder layers, on megatron.core's parallel linears.

Legend: S sequence, B batch, H width of the decoder, M media of a row, L features of a medium, K = M * L, W their width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer

from mindspeed_mm.models.kit.perceiver import UnbiasedMLP, unbiased_column, unbiased_row
from mindspeed_mm.platform import current_platform

EPSILON = 1e-5
"""Of the norms; open_flamingo takes torch's default."""

EXPANSION = 4
"""Width of the MLP over the decoder's."""


@dataclass(frozen=True)
class CrossAttention:
    """Which layers have it, and its sizes."""

    every: int
    """A layer in front of each decoder layer whose number, counted from 1, is a multiple of this."""
    memory_size: int
    """W"""
    heads: int = 8
    channels: int = 64
    """Of a head."""

    def before(self, layer: int) -> bool:
        """Whether decoder layer `layer`, counted from 0 over the whole model, has one in front of it."""
        return (layer + 1) % self.every == 0


def media_mask(is_medium: torch.Tensor, features: int, media: int, *, latest: bool) -> torch.Tensor:
    """Which features each token may attend to.

    Args:
        is_medium: bool [B, S], True where a medium stands in the text.
        features: L; media: M, of the row with the most.
        latest: a token sees the last medium up to itself alone; else all up to itself.

    Returns:
        bool [B, 1, S, K]; all False for tokens before the first medium. (Not `latest`, open_flamingo gives these the
        mean over all media of the row, later ones as well. No released model is of that kind.)
    """
    seen = is_medium.cumsum(dim=1)[:, :, None]
    number = torch.arange(1, media + 1, device=is_medium.device)
    mask = seen == number if latest else seen >= number
    return mask.repeat_interleave(features, dim=2)[:, None]


class GatedCrossBlock(MegatronModule):
    """Attention to features and an MLP, each times the tanh of a gate that begins at zero, and added to its input."""

    def __init__(self, config: TransformerConfig, cross: CrossAttention) -> None:
        config = copy.copy(config)
        config.ffn_hidden_size, config.layernorm_epsilon = EXPANSION * config.hidden_size, EPSILON
        config.activation_func = torch.nn.functional.gelu
        super().__init__(config=config)
        whole = copy.copy(config)  # the features are whole on every rank
        whole.sequence_parallel = False
        size, width = cross.heads * cross.channels, config.hidden_size
        self.channels = cross.channels
        self.attention_norm = torch.nn.LayerNorm(width, eps=EPSILON)
        self.linear_q = unbiased_column(config, width, size)
        self.linear_kv = unbiased_column(whole, cross.memory_size, 2 * size)
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


class GatedLayer(TransformerLayer):
    """A decoder layer behind gated cross-attention. megatron.core hands on `context`, the features, and its mask."""

    def __init__(self, *args, cross: CrossAttention, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.gated_cross = GatedCrossBlock(self.config, cross)

    def forward(self, hidden_states: torch.Tensor, *args, context=None, context_mask=None, **kwargs):
        """As TransformerLayer."""
        hidden_states = self.gated_cross(hidden_states, context, context_mask)
        output, _ = super().forward(hidden_states, *args, **kwargs)
        return output, context
