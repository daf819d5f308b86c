"""Layer specs on megatron.core's parallel linear layers, with our norms and attention.

megatron.core's own local ViT spec is causal in the releases we support, so that a CLIP vision encoder built on it is
wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from mindspeed_mm.models.kit.add_norm import Layer
from mindspeed_mm.models.kit.attention import CoreAttention, Scope
from mindspeed_mm.models.kit.cross_spec import CrossAttentionSpec
from mindspeed_mm.models.kit.gated_cross import GatedLayer
from mindspeed_mm.models.kit.mlp import MLP, PostNormMLP
from mindspeed_mm.models.kit.norm import Norm, UnbiasedNorm
from mindspeed_mm.models.kit.self_attention import SelfAttention
from mindspeed_mm.models.kit.shown_states import ShowingLayer, ShownStates


@dataclass(frozen=True)
class LayerOptions:
    """What a layer has beside, or in place of, what Llama's have; see SelfAttention and MLP."""

    qk_norm: bool = False
    post_norms: bool = False
    scale: float | None = None
    window: int | None = None
    soft_cap: float | None = None
    scope: Scope | None = None
    alibi_bias_max: float | None = None
    norm_bias: bool = True
    cross: CrossAttentionSpec | None = None
    shows: ShownStates | None = None


def layer_spec(*, causal: bool, options: LayerOptions = LayerOptions()) -> ModuleSpec:
    """Pre-norm transformer layer: norm, attention, add, norm, MLP, add."""
    norm = Norm if options.norm_bias else UnbiasedNorm
    head_norm = Norm if options.qk_norm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={
            "attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask,
            "post_norm": options.post_norms,
            "scale": options.scale,
            "window": options.window,
            "soft_cap": options.soft_cap,
            "scope": options.scope,
            "alibi_bias_max": options.alibi_bias_max,
        },
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=CoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    module, params = Layer, {}
    if options.cross is not None:
        module, params = GatedLayer, {"cross": options.cross}
    elif options.shows is not None:
        module, params = ShowingLayer, {"shows": options.shows}
    return ModuleSpec(
        module=module,
        params=params,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=PostNormMLP if options.post_norms else MLP,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(layers: Sequence[LayerOptions], *, causal: bool) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and a final norm."""
    specs = {options: layer_spec(causal=causal, options=options) for options in layers}
    norm = Norm if all(options.norm_bias for options in layers) else UnbiasedNorm
    return TransformerBlockSubmodules(layer_specs=[specs[options] for options in layers], layer_norm=norm)
