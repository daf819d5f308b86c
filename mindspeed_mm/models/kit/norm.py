"""RMSNorm and LayerNorm for megatron.core layer specs.

megatron.core's own torch norms refuse sequence parallelism; these mark their parameters instead, so that
megatron.core sums their gradients over the tensor-parallel ranks.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig

from mindspeed_mm.platform import current_platform


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019), over the last dimension."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.platform = current_platform()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.lent: tuple[torch.Tensor, torch.Tensor] | None = None
        """An input and its norm, where the operation before has computed it (add_norm.py)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lent, self.lent = self.lent, None
        if lent is not None and lent[0] is x:
            learns = torch.is_grad_enabled() and self.weight.requires_grad
            if lent[1].requires_grad or not learns:  # else the weight alone is trained, which the loan does not know
                return lent[1]
        return self.platform.rms_norm(x, self.weight, self.eps)


class ZeroCenteredRMSNorm(torch.nn.Module):
    """RMSNorm whose factor is 1 + weight (Gemma), added and applied in float32 as transformers does."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.platform = current_platform()
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.platform.rms_norm(x, self.weight.float() + 1.0, self.eps)


class Norm:
    """Spec entry: builds the norm that `config.normalization` and `config.layernorm_zero_centered_gamma` name."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused) -> torch.nn.Module:
        if config.normalization == "RMSNorm":
            norm_class = ZeroCenteredRMSNorm if config.layernorm_zero_centered_gamma else RMSNorm
        else:
            norm_class = torch.nn.LayerNorm
        norm = norm_class(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class UnbiasedNorm:
    """Spec entry: builds a LayerNorm without bias (MPT)."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused) -> torch.nn.Module:
        norm = torch.nn.LayerNorm(hidden_size, eps=eps, bias=False)
        norm.weight.sequence_parallel = config.sequence_parallel
        return norm
