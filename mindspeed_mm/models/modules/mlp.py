"""MLP projector between the tower and the decoder.

Legend: N pictures, P patches, Hv tower width, H decoder width.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule

from mindspeed_mm.models.layers.specs import MLP_SUBMODULES
from mindspeed_mm.models.runtime import Runtime, transformer_config


class MLPProjector(MegatronModule):
    """Linear, GELU, Linear with biases (LLaVA-1.5's mlp2x_gelu), split over the tensor-parallel ranks."""

    def __init__(self, spec, runtime: Runtime) -> None:
        config = transformer_config(
            spec,
            runtime,
            num_layers=spec.num_layers,
            pipelined=False,
            sequence_parallel=False,
            # There is no attention; megatron.core wants a number that the ranks can share.
            num_attention_heads=runtime.tensor_model_parallel_size,
        )
        super().__init__(config=config)
        self.encoder = MLP(config, MLP_SUBMODULES, input_size=spec.input_size, ffn_hidden_size=spec.ffn_hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[N, P, Hv] -> [N, P, H]"""
        projected, bias = self.encoder(features)
        return projected + bias
