"""Layers of a vision encoder whose features are the hidden states behind several of them, side by side.

megatron.core hands a tensor from layer to layer beside the hidden state, its `context`, through recomputation as well.
Here it holds what the layers so far have shown.

Legend: S positions, B images, H hidden size, N hidden states that are shown so far.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mindspeed_mm.models.kit.add_norm import Layer


@dataclass(frozen=True)
class ShownStates:
    """What a layer does with the states that are shown."""

    adds: bool
    """Whether its own result is one of them."""
    gives: bool
    """Whether it is the last layer, whose result is all of them."""


class ShowingLayer(Layer):
    """A layer that takes [S, B, H] and hands on the states shown so far, [S, B, N H]."""

    def __init__(self, *args, shows: ShownStates, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.shows = shows

    def forward(self, hidden_states: torch.Tensor, *args, context: torch.Tensor | None = None, **kwargs):
        """As TransformerLayer; the last layer gives [S, B, N H] in the place of its hidden state."""
        hidden, _ = super().forward(hidden_states, *args, **kwargs)
        if self.shows.adds:
            context = hidden if context is None else torch.cat((context, hidden), dim=-1)
        return (context, None) if self.shows.gives else (hidden, context)
