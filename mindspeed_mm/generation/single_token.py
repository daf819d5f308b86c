"""One new token a row through the decoder's layers, on their weights and without megatron.core's per-layer machinery.

Between two tokens of a small batch that machinery takes longer than the arithmetic. Prompts, and layers whose modules
are not exactly the ones known here (adapters, quantised weights), go through the modules themselves.

Legend: R rows, H hidden size, A query heads per key/value head, G key/value heads of this rank, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import NoneType

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp

from mindspeed_mm.models.kit.decoder import TextDecoder
from mindspeed_mm.models.kit.kv_cache import KVCache
from mindspeed_mm.models.kit.mlp import MLP
from mindspeed_mm.models.kit.norm import RMSNorm
from mindspeed_mm.platform import current_platform


@dataclass(frozen=True)
class _Layer:
    """The weights of a layer; they are the module's own tensors."""

    norm_1: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    proj: torch.Tensor
    norm_2: torch.Tensor
    fc1: torch.Tensor
    fc2: torch.Tensor
    window: int | None


class SingleTokenStep:
    """Layers and final norm of a pipeline stage, for one token a row."""

    def __init__(self, decoder: TextDecoder) -> None:
        self._decoder, config = decoder, decoder.config
        self._layers = [_weights(layer) for layer in decoder.decoder.layers]
        attention = decoder.decoder.layers[0].self_attention
        self._head_size = attention.hidden_size_per_attention_head
        self._groups = attention.num_query_groups_per_partition
        self._per_group = attention.num_attention_heads_per_partition // self._groups
        self._scale, self._soft_cap = attention.core_attention.scale, attention.core_attention.soft_cap
        self._eps, self._activation = config.layernorm_epsilon, config.activation_func
        self._parallel = config.tensor_model_parallel_size > 1
        self._platform = current_platform()

    @staticmethod
    def fits(decoder: TextDecoder) -> bool:
        """True where every layer is made of the modules that this class knows."""
        config = decoder.config
        plain = config.gated_linear_unit and config.normalization == "RMSNorm" and not config.add_bias_linear
        return bool(
            plain
            and not config.fp32_residual_connection
            and len(decoder.decoder.layers)
            and all(_is_known(layer) for layer in decoder.decoder.layers)
        )

    def __call__(self, hidden: torch.Tensor, position_ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Append one token to each row of the cache, which its `begin` has announced.

        Args:
            hidden: [1, R, H]; position_ids: [R, 1] int64.

        Returns:
            [1, R, H], normalised on the last stage.
        """
        x = hidden[0]
        cos, sin = self._decoder.rotary.cos_sin(position_ids, x.dtype)  # each [1, R, 1, 1, D / 2]
        for index, layer in enumerate(self._layers):
            attended = self._attend(self._norm(x, layer.norm_1), layer, index, cos, sin, cache)
            x, normed = self._add_and_norm(attended, x, layer.norm_2)
            x = x + self._sum(F.linear(self._gated(F.linear(normed, layer.fc1)), layer.fc2))
        norm = self._decoder.decoder.final_layernorm
        return (x if norm is None else norm(x)).unsqueeze(0)

    # The platform's operators where it has some, else torch's own, which take less time without a backward pass.

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self._platform.adds_in_norm:
            return self._platform.rms_norm(x, weight, self._eps)
        return F.rms_norm(x, x.shape[-1:], weight, self._eps)

    def _add_and_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._platform.adds_in_norm:
            return self._platform.add_rms_norm(x, residual, weight, self._eps)
        total = residual + x
        return total, self._norm(total, weight)

    def _gated(self, x: torch.Tensor) -> torch.Tensor:
        if self._platform.adds_in_norm and self._activation is F.silu:
            return self._platform.swiglu(x)
        gate, up = x.chunk(2, dim=-1)
        return self._activation(gate) * up

    def _attend(self, x, layer: _Layer, index: int, cos, sin, cache: KVCache) -> torch.Tensor:
        rows = x.shape[0]
        qkv = F.linear(x, layer.qkv, layer.qkv_bias).unsqueeze(0)
        qkv = self._platform.rotate_qk(qkv, cos, sin, self._groups, self._head_size)
        # Queries of a group take the place of a sequence: they share keys and values, which are not repeated.
        qkv = qkv.view(rows, self._groups, self._per_group + 2, self._head_size)
        query, key, value = qkv.split((self._per_group, 1, 1), dim=2)
        keys, values, mask = cache.update(index, key, value, layer.window)
        output = self._platform.attention(
            query, keys, values, mask=mask, causal=False, scale=self._scale, dropout=0.0, soft_cap=self._soft_cap
        )
        return self._sum(F.linear(output.reshape(rows, -1), layer.proj))

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        return reduce_from_tensor_model_parallel_region(x) if self._parallel else x


def _weights(layer: torch.nn.Module) -> _Layer:
    attention, mlp = layer.self_attention, layer.mlp
    return _Layer(
        layer.input_layernorm.weight,
        attention.linear_qkv.weight,
        attention.linear_qkv.bias,
        attention.linear_proj.weight,
        layer.pre_mlp_layernorm.weight,
        mlp.linear_fc1.weight,
        mlp.linear_fc2.weight,
        attention.core_attention.window,
    )


def _is_known(layer: torch.nn.Module) -> bool:
    attention, mlp = layer.self_attention, layer.mlp
    if hasattr(layer, "gated_cross"):
        return False
    expected = (
        (layer.input_layernorm, RMSNorm),
        (layer.pre_mlp_layernorm, RMSNorm),
        (attention.linear_qkv, ColumnParallelLinear),
        (attention.linear_proj, RowParallelLinear),
        (attention.q_layernorm, IdentityOp),
        (attention.k_layernorm, IdentityOp),
        (attention.post_layernorm, NoneType),
        (mlp, MLP),
        (mlp.linear_fc1, ColumnParallelLinear),
        (mlp.linear_fc2, RowParallelLinear),
    )
    hooks = any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())
    return not hooks and all(type(module) is kind for module, kind in expected)
