"""megatron.core's MLP with the platform's SwiGLU, which keeps less for the backward pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import mlp

from mindspeed_mm.platform import current_platform

SUBMODULES = mlp.MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


class MLP(mlp.MLP):
    """Linear, activation, linear, split over the tensor-parallel ranks."""

    def __init__(self, config, submodules=SUBMODULES, **kwargs) -> None:
        super().__init__(config, submodules, **({"ffn_hidden_size": config.ffn_hidden_size} | kwargs))
        self.is_swiglu = config.gated_linear_unit and config.activation_func is F.silu and not config.add_bias_linear
        self.platform = current_platform()

    def forward(self, hidden_states: torch.Tensor, **unused) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[S, B, H] -> ([S, B, H], the bias to be added or None)."""
        if not self.is_swiglu:
            return super().forward(hidden_states, **unused)
        return self.linear_fc2(self.platform.swiglu(self.linear_fc1(hidden_states)[0]))
