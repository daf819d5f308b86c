"""Layer specs on megatron.core's parallel linear layers, with our norms and attention.

megatron.core's own local ViT spec is causal in the releases we support, so that a CLIP vision encoder built on it is
wrong.
"""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from mindspeed_mm.models.layers.attention import CoreAttention
from mindspeed_mm.models.layers.mlp import MLP
from mindspeed_mm.models.layers.norm import Norm
from mindspeed_mm.models.layers.self_attention import SelfAttention


def layer_spec(*, causal: bool) -> ModuleSpec:
    """Pre-norm transformer layer: norm, attention, add, norm, MLP, add."""
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=CoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=MLP,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(num_layers: int, *, causal: bool) -> TransformerBlockSubmodules:
    """`num_layers` equal layers (those of this pipeline stage) and a final norm."""
    return TransformerBlockSubmodules(layer_specs=[layer_spec(causal=causal)] * num_layers, layer_norm=Norm)
