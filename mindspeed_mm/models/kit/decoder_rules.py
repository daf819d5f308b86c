"""Weight rules and shapes that the text decoders share, in HF's names of Llama and in ours.

Letters: V vocabulary, H hidden size, F MLP size, N heads, G query groups, D channels per head.
"""

from __future__ import annotations

from mindspeed_mm.models.kit.decoder_spec import DecoderSpec
from mindspeed_mm.weights.rules import QKV, Drop, GateUp, Rule, RuleSet, Vocab

LAYER = "decoder.layers.{}."
HF_LAYER = "model.layers.{}."

ATTENTION = LAYER + "self_attention."
TIED = ("output_layer.weight", "embedding.word_embeddings.weight")

QKV_RULES = (
    QKV(
        ATTENTION + "linear_qkv.weight",
        tuple(f"{HF_LAYER}self_attn.{name}_proj.weight" for name in "qkv"),
        axis=0,
    ),
    QKV(
        ATTENTION + "linear_qkv.bias",
        tuple(f"{HF_LAYER}self_attn.{name}_proj.bias" for name in "qkv"),
        axis=0,
        needs="qkv_bias",
    ),
)
GATE_UP = GateUp(
    LAYER + "mlp.linear_fc1.weight",
    (HF_LAYER + "mlp.gate_proj.weight", HF_LAYER + "mlp.up_proj.weight"),
    axis=0,
)
QK_NORMS = (
    Rule(ATTENTION + "q_layernorm.weight", (HF_LAYER + "self_attn.q_norm.weight",)),
    Rule(ATTENTION + "k_layernorm.weight", (HF_LAYER + "self_attn.k_norm.weight",)),
)
PRE_MLP_NORM = (Rule(LAYER + "pre_mlp_layernorm.weight", (HF_LAYER + "post_attention_layernorm.weight",)),)


def hf_rules(
    *,
    qkv: tuple[Rule, ...] = QKV_RULES,
    gate_up: Rule = GATE_UP,
    norms: tuple[Rule, ...] = PRE_MLP_NORM,
) -> RuleSet:
    """HF's names of Llama, with what a decoder names otherwise in their place.

    `norms` are those of a layer beside its input_layernorm.
    """
    return RuleSet(
        (
            Vocab("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), axis=0),
            Rule(LAYER + "input_layernorm.weight", (HF_LAYER + "input_layernorm.weight",)),
            *qkv,
            Rule(ATTENTION + "linear_proj.weight", (HF_LAYER + "self_attn.o_proj.weight",), axis=1),
            *norms,
            gate_up,
            Rule(LAYER + "mlp.linear_fc2.weight", (HF_LAYER + "mlp.down_proj.weight",), axis=1),
            Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
            Vocab("output_layer.weight", ("lm_head.weight",), axis=0),
            Drop("model.layers.{}.self_attn.rotary_emb.inv_freq"),
            Drop("model.rotary_emb.inv_freq"),
        ),
        tied=TIED,
    )


LLAMA_RULES = hf_rules()


def shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of our tensors; `{}` is the layer. Those that only some decoders have are there as well."""
    hidden, vocabulary = spec.hidden_size, (spec.language_vocab_size, spec.hidden_size)
    heads = spec.num_attention_heads * spec.kv_channels
    qkv = heads + 2 * spec.num_query_groups * spec.kv_channels
    return {
        "embedding.word_embeddings.weight": vocabulary,
        LAYER + "input_layernorm.weight": (hidden,),
        ATTENTION + "linear_qkv.weight": (qkv, hidden),
        ATTENTION + "linear_qkv.bias": (qkv,),
        ATTENTION + "q_layernorm.weight": (spec.kv_channels,),
        ATTENTION + "k_layernorm.weight": (spec.kv_channels,),
        ATTENTION + "linear_proj.weight": (hidden, heads),
        ATTENTION + "post_layernorm.weight": (hidden,),
        LAYER + "pre_mlp_layernorm.weight": (hidden,),
        LAYER + "mlp.linear_fc1.weight": (2 * spec.ffn_hidden_size, hidden),
        LAYER + "mlp.linear_fc2.weight": (hidden, spec.ffn_hidden_size),
        LAYER + "mlp.post_layernorm.weight": (hidden,),
        "decoder.final_layernorm.weight": (hidden,),
        "output_layer.weight": vocabulary,
    }


CHECKED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "language_vocab_size",
    "rotary_base",
    "rope_scaling",
    "layernorm_epsilon",
    "share_embeddings_and_output_weights",
    "traits",
)
"""What the config of weights must confirm before they are loaded."""


def build_decoder(
    spec: DecoderSpec, runtime, *, pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None
):
    """The decoder's layers of this (virtual) pipeline stage; models.runtime.Runtime says how it is spread."""
    from mindspeed_mm.models.kit.decoder import TextDecoder

    return TextDecoder(spec, runtime, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage)
