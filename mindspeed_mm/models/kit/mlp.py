"""megatron.core's MLP with the platform's gated activations, which keep less for the backward pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import mlp

from mindspeed_mm.models.kit.norm import Norm
from mindspeed_mm.models.runtime import gelu_tanh
from mindspeed_mm.platform import current_platform
from mindspeed_mm.platform.core_versions import takes

SUBMODULES = mlp.MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


class MLP(mlp.MLP):
    """Linear, activation, linear, split over the tensor-parallel ranks."""

    def __init__(self, config, submodules=SUBMODULES, **kwargs) -> None:
        width = {"ffn_hidden_size": config.ffn_hidden_size} if takes(mlp.MLP, "ffn_hidden_size") else {}
        super().__init__(config, submodules, **(width | kwargs))
        self.gated = None
        if config.gated_linear_unit:
            platform = current_platform()
            self.gated = {F.silu: platform.swiglu, gelu_tanh: platform.geglu}[config.activation_func]

    def forward(self, hidden_states: torch.Tensor, **unused) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[S, B, H] -> ([S, B, H], the bias to be added or None)."""
        if self.gated is None:
            return super().forward(hidden_states, **unused)
        hidden, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(self.gated(hidden if bias is None else hidden + bias))


class PostNormMLP(MLP):
    """MLP with a norm behind it (Gemma 2)."""

    def __init__(self, config, submodules=SUBMODULES, **kwargs) -> None:
        super().__init__(config, submodules, **kwargs)
        self.post_layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, hidden_states: torch.Tensor, **unused) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[S, B, H] -> ([S, B, H], no bias)."""
        output, bias = super().forward(hidden_states, **unused)
        return self.post_layernorm(output), bias
