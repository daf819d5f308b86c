"""MPT decoder (MosaicML 2023): ALiBi in place of positions, LayerNorm and linears without biases, GELU, a tied head."""

from typing import Annotated, Any, Literal

import pydantic

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.kit.cross_rules import cross_rules
from mindspeed_mm.models.kit.cross_spec import CrossDecoderSpec, with_cross_config, with_cross_shapes
from mindspeed_mm.models.kit.decoder_rules import ATTENTION, CHECKED, LAYER, TIED, build_decoder
from mindspeed_mm.models.kit.decoder_spec import DecoderTraits, Positive
from mindspeed_mm.models.kit.hf_config import HfFormat, check_head_width
from mindspeed_mm.models.part import Part, only
from mindspeed_mm.weights.rules import PackedQKV, Rule, RuleSet, Vocab


class MptSpec(CrossDecoderSpec):
    """text_decoder block of a model.json."""

    model_id: Literal["mpt"] = "mpt"
    lm_position_embedding_type: Annotated[str, only("alibi", why="MPT has ALiBi")] = "alibi"
    alibi_bias_max: Positive = 8.0
    """The slopes of the heads are powers of 2 ** (-alibi_bias_max / heads)."""
    softmax_scale: Positive | None = None
    """Factor on the scores; null: kv_channels ** -0.5."""
    normalization: Annotated[str, only("LayerNorm", why="MPT has LayerNorm")] = "LayerNorm"
    activation_func: Annotated[str, only("gelu", why="MPT has GELU")] = "gelu"
    gated_linear_unit: Annotated[bool, only(False, why="MPT's MLP has no gate")] = False
    add_qkv_bias: Annotated[bool, only(False, why="MPT's linears have no biases")] = False
    share_embeddings_and_output_weights: bool = True
    rope_scaling: Annotated[None, only(None, why="MPT has ALiBi")] = None

    @pydantic.model_validator(mode="after")
    def _heads_fill_the_width(self) -> "MptSpec":
        if self.num_query_groups != self.num_attention_heads:
            raise ValueError(
                f"num_query_groups is {self.num_query_groups}; expected {self.num_attention_heads}: every head of MPT "
                "has its own keys"
            )
        if self.num_attention_heads * self.kv_channels != self.hidden_size:
            raise ValueError(
                f"{self.num_attention_heads} heads of {self.kv_channels} channels are not hidden_size "
                f"{self.hidden_size}, as MPT has it; change one of them"
            )
        return self

    @property
    def traits(self) -> DecoderTraits:
        return DecoderTraits(alibi_bias_max=self.alibi_bias_max, attention_scale=self.softmax_scale, norm_bias=False)


_NAMES = {
    "num_layers": "n_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "max_position_embeddings": "max_seq_len",
    "layernorm_epsilon": "layer_norm_epsilon",
}
"""Our keys and MPT's, where they are not those of most decoders."""

_DERIVED = {
    "num_query_groups": "n_heads",
    "kv_channels": "d_model",
    "ffn_hidden_size": "expansion_ratio",
    "alibi_bias_max": "attn_config.alibi_bias_max",
    "softmax_scale": "attn_config.softmax_scale",
}
"""Our keys and those that they follow from."""

FORMAT = HfFormat(
    MptSpec,
    ("mpt",),
    "MptForCausalLM",
    defaults={
        "d_model": 2048,
        "n_heads": 16,
        "n_layers": 24,
        "expansion_ratio": 4,
        "max_seq_len": 2048,
        "vocab_size": 50368,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "no_bias": True,
        "norm_type": "low_precision_layernorm",
        "logit_scale": None,
        "attn_config": None,
        "emb_pdrop": 0.0,  # these two are switched off for the models of this project
        "resid_pdrop": 0.0,
        "learned_pos_emb": True,  # these change no number of a model with ALiBi
        "embedding_fraction": 1.0,
        "init_device": "cpu",
        "init_config": None,
        "verbose": 0,
    },
)

_BUILT: dict[str, tuple[Any, ...]] = {
    "no_bias": (True,),
    "norm_type": ("low_precision_layernorm", "layernorm"),
    "logit_scale": (None,),
}
"""Values of MPT's choices that are built here."""

_ATTENTION: dict[str, tuple[Any, ...]] = {
    "attn_type": ("multihead_attention",),
    "clip_qkv": (None,),
    "prefix_lm": (False,),
    "qk_ln": (False,),
    "attn_uses_sequence_id": (False,),
    "alibi": (True,),
}
"""The same inside attn_config."""


def from_hf(config: dict[str, Any]) -> MptSpec:
    """MptSpec of an HF MPT config.json. Raises ConfigError for what is not built: clipped or normed queries and keys,
    prefixes, biases, positions that are no ALiBi."""
    full = FORMAT.fill(config)
    attention, ratio = full["attn_config"] or {}, full["expansion_ratio"]
    if not isinstance(attention, dict):
        raise ConfigError(f"{FORMAT.name}: found attn_config {attention!r}; expected an object. Correct it.")
    if type(ratio) is not int:
        raise ConfigError(f"{FORMAT.name}: found expansion_ratio {ratio!r}; expected a whole number. Correct it.")
    # MosaicML's own code has positions without ALiBi by default, transformers ALiBi; files say it.
    other = [f"{key} {full[key]!r}" for key, allowed in _BUILT.items() if full[key] not in allowed]
    other += [
        f"attn_config.{key} {attention[key]!r}"
        for key, allowed in _ATTENTION.items()
        if attention.get(key, allowed[0]) not in allowed
    ]
    if other:
        raise ConfigError(
            f"{FORMAT.name}: found {' and '.join(other)}; expected ALiBi, no biases, and plain multi-head attention, "
            "as MPT-7B has it. Use weights of such a model."
        )
    check_head_width(FORMAT.name, full, "d_model", "n_heads")
    own = {ours: full[theirs] for ours, theirs in _NAMES.items()}
    own |= {
        "num_query_groups": None,
        "kv_channels": None,
        "ffn_hidden_size": ratio * (full["d_model"] if type(full["d_model"]) is int else 1),
        "activation_func": "gelu",
        "alibi_bias_max": attention.get("alibi_bias_max", 8),
        "softmax_scale": attention.get("softmax_scale"),
    }
    return FORMAT.spec_of(full, _NAMES | _DERIVED, **own)


def to_hf(spec: MptSpec, dtype: str) -> dict[str, Any]:
    """config.json of an HF MPT. Raises ConfigError where an MLP is no whole multiple of the width: MPT's configs have a
    ratio."""
    if spec.ffn_hidden_size % spec.hidden_size:
        raise ConfigError(
            f"ffn_hidden_size {spec.ffn_hidden_size} is no multiple of hidden_size {spec.hidden_size}; {FORMAT.name} "
            "has expansion_ratio alone. Change one of them."
        )
    slope = spec.alibi_bias_max
    return {
        "architectures": [FORMAT.architecture],
        "model_type": "mpt",
        **{theirs: getattr(spec, ours) for ours, theirs in _NAMES.items()},
        "expansion_ratio": spec.ffn_hidden_size // spec.hidden_size,
        "vocab_size": spec.language_vocab_size,
        "initializer_range": spec.init_method_std,
        "tie_word_embeddings": spec.share_embeddings_and_output_weights,
        "no_bias": True,
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": int(slope) if slope.is_integer() else slope,
            "softmax_scale": spec.softmax_scale,
        },
        "torch_dtype": dtype,
    }


_HF_LAYER = "transformer.blocks.{}."

HF_RULES = RuleSet(
    (
        Vocab("embedding.word_embeddings.weight", ("transformer.wte.weight",), axis=0),
        Rule(LAYER + "input_layernorm.weight", (_HF_LAYER + "norm_1.weight",)),
        PackedQKV(ATTENTION + "linear_qkv.weight", (_HF_LAYER + "attn.Wqkv.weight",), axis=0),
        Rule(ATTENTION + "linear_proj.weight", (_HF_LAYER + "attn.out_proj.weight",), axis=1),
        Rule(LAYER + "pre_mlp_layernorm.weight", (_HF_LAYER + "norm_2.weight",)),
        Rule(LAYER + "mlp.linear_fc1.weight", (_HF_LAYER + "ffn.up_proj.weight",), axis=0),
        Rule(LAYER + "mlp.linear_fc2.weight", (_HF_LAYER + "ffn.down_proj.weight",), axis=1),
        Rule("decoder.final_layernorm.weight", ("transformer.norm_f.weight",)),
        Vocab("output_layer.weight", ("lm_head.weight",), axis=0),
    ),
    tied=TIED,
)


def shapes(spec: MptSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of our tensors; `{}` is the layer."""
    width, inner = spec.hidden_size, spec.ffn_hidden_size
    vocabulary = (spec.language_vocab_size, width)
    return {
        "embedding.word_embeddings.weight": vocabulary,
        LAYER + "input_layernorm.weight": (width,),
        ATTENTION + "linear_qkv.weight": (3 * width, width),
        ATTENTION + "linear_proj.weight": (width, width),
        LAYER + "pre_mlp_layernorm.weight": (width,),
        LAYER + "mlp.linear_fc1.weight": (inner, width),
        LAYER + "mlp.linear_fc2.weight": (width, inner),
        "decoder.final_layernorm.weight": (width,),
        "output_layer.weight": vocabulary,
    }


PART = Part(
    name="mpt",
    kind="text_decoder",
    model_types=FORMAT.model_types,
    keys=FORMAT.keys,
    Spec=MptSpec,
    from_hf=with_cross_config(from_hf),
    to_hf=to_hf,
    rules=cross_rules(HF_RULES, _HF_LAYER),
    shapes=with_cross_shapes(shapes),
    build=build_decoder,
    checked=CHECKED,
    checked_where={"cross_attention": "cross_attention"},
)
