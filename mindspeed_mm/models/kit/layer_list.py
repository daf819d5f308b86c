"""A list of layers that checkpoints can split."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule


class LayerList(MegatronModule):
    """Layers one behind the other, each called with the one before's result and whatever else it is given."""

    def __init__(self, config: TransformerConfig, layers: Iterable[MegatronModule]) -> None:
        super().__init__(config=config)
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, hidden: torch.Tensor, *others) -> torch.Tensor:
        """`others` as the layers want them."""
        for layer in self.layers:
            hidden = layer(hidden, *others)
        return hidden

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata=None):
        """Of each layer by itself: megatron.core takes what stands in a list for whole on every rank."""
        tensors = {}
        for number, layer in enumerate(self.layers):
            tensors |= layer.sharded_state_dict(f"{prefix}layers.{number}.", sharded_offsets, metadata)
        return tensors
