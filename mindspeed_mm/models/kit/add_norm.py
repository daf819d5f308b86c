"""The addition behind attention and the norm of the sum in one operator, on platforms that have one.

megatron.core's layer adds first (self_attn_bda) and norms later (pre_mlp_layernorm), in two modules. Here the addition
computes both, and the norm finds its result there.

Legend: S sequence, B batch, H hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.transformer_layer import TransformerLayer

from mindspeed_mm.models.kit.norm import RMSNorm


class AddBeforeNorm:
    """Takes the place of a layer's self_attn_bda: adds, and lends the norm behind it the norm of the sum."""

    def __init__(self, norm: RMSNorm) -> None:
        self.norm = norm

    def __call__(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """As megatron.core's get_bias_dropout_add."""
        return functools.partial(self._add, training, get_bias_dropout_add(training, fused))

    def _add(self, training: bool, general: Callable, x_with_bias, residual: torch.Tensor, dropout: float):
        """[S, B, H]"""
        x, bias = x_with_bias
        norm = self.norm
        if bias is not None or (training and dropout) or x.dtype != residual.dtype:
            return general(x_with_bias, residual, dropout)
        # megatron.core enables gradients here, also where a pass is to be computed again later.
        with torch.set_grad_enabled(x.requires_grad or residual.requires_grad):
            total, normed = norm.platform.add_rms_norm(x, residual, norm.weight, norm.eps)
        norm.lent = (total, normed)
        return total


class Layer(TransformerLayer):
    """megatron.core's layer, in which addition and norm are one operation where the platform has it as one."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        norm = self.pre_mlp_layernorm
        if type(norm) is RMSNorm and norm.platform.adds_in_norm:
            self.self_attn_bda = AddBeforeNorm(norm)
