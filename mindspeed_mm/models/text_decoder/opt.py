"""OPT decoder (Zhang et al. 2022): learned positions, LayerNorm before attention and MLP, ReLU, biases everywhere, a
tied head."""

from typing import Annotated, Any, Literal

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.kit.decoder_rules import ATTENTION, CHECKED, LAYER, TIED, build_decoder
from mindspeed_mm.models.kit.decoder_spec import DecoderSpec, DecoderTraits, Positive
from mindspeed_mm.models.kit.hf_config import FIELDS, HfFormat, check_head_width
from mindspeed_mm.models.part import Part, only
from mindspeed_mm.weights.rules import QKV, Rule, RuleSet, Vocab

OFFSET = 2
"""Rows of the table of positions before that of position 0, which fairseq kept for padding."""

EPSILON = 1e-5
"""Of all norms; transformers takes torch's default."""


class OptSpec(DecoderSpec):
    """text_decoder block of a model.json."""

    model_id: Literal["opt"] = "opt"
    lm_position_embedding_type: Annotated[str, only("learned_absolute", why="OPT has learned positions")] = (
        "learned_absolute"
    )
    normalization: Annotated[str, only("LayerNorm", why="OPT has LayerNorm")] = "LayerNorm"
    layernorm_epsilon: Annotated[float, only(EPSILON, why="OPT's configs have no key for another")] = EPSILON
    activation_func: Annotated[str, only("relu", why="OPT has ReLU")] = "relu"
    gated_linear_unit: Annotated[bool, only(False, why="OPT's MLP has no gate")] = False
    add_bias_linear: Annotated[bool, only(True, why="OPT's linears have biases")] = True
    add_qkv_bias: Annotated[bool, only(True, why="OPT's linears have biases")] = True
    share_embeddings_and_output_weights: bool = True
    rotary_base: Positive = 10000.0
    rope_scaling: Annotated[None, only(None, why="OPT's positions are learned")] = None

    @property
    def traits(self) -> DecoderTraits:
        return DecoderTraits(position_offset=OFFSET)


_NAMES = {
    "ffn_hidden_size": "ffn_dim",
    "activation_func": "activation_function",
    "init_method_std": "init_std",
}
"""Our keys and OPT's, where they are not those of most decoders."""

FORMAT = HfFormat(
    OptSpec,
    ("opt",),
    "OPTForCausalLM",
    defaults={
        "vocab_size": 50272,
        "hidden_size": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "init_std": 0.02,
        "tie_word_embeddings": True,
        "word_embed_proj_dim": None,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "dropout": 0.1,  # these are switched off for the models of this project
        "layerdrop": 0.0,
        "attention_dropout": 0.0,
    },
)

_BUILT = {
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
}
"""Choices of OPT's configs that are built here."""


def from_hf(config: dict[str, Any]) -> OptSpec:
    """OptSpec of an HF OPT config.json. Raises ConfigError for OPT-350m's ways: norms behind, narrower embeddings."""
    full = FORMAT.fill(config)
    other = [f"{key} {full[key]}" for key, value in _BUILT.items() if full[key] != value]
    if full["word_embed_proj_dim"] not in (None, full["hidden_size"]):
        other.append(f"word_embed_proj_dim {full['word_embed_proj_dim']}")
    if other:
        raise ConfigError(
            f"{FORMAT.name}: found {' and '.join(other)}; expected norms with weights before attention and MLP, "
            "biases, and embeddings as wide as the layers, as all OPT but 350m has. Use weights of another size."
        )
    own = {ours: full[theirs] for ours, theirs in _NAMES.items()}
    check_head_width(FORMAT.name, full, "hidden_size", "num_attention_heads")
    groups = "num_attention_heads" if full["num_key_value_heads"] is None else "num_key_value_heads"
    return FORMAT.spec_of(full, _NAMES | {"num_query_groups": groups}, **own, layernorm_epsilon=EPSILON)


def to_hf(spec: OptSpec, dtype: str) -> dict[str, Any]:
    """config.json of an HF OPT."""
    written = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
    return {
        "architectures": [FORMAT.architecture],
        "model_type": "opt",
        **{key: getattr(spec, FIELDS[key]) for key in (*written, "tie_word_embeddings")},
        **{theirs: getattr(spec, ours) for ours, theirs in _NAMES.items()},
        **_BUILT,
        "word_embed_proj_dim": spec.hidden_size,
        "torch_dtype": dtype,
    }


_HF_LAYER = "model.decoder.layers.{}."


def _pair(ours: str, theirs: str, axis: int | None = None) -> tuple[Rule, Rule]:
    """Weight and bias; a linear that is split by columns has its whole bias on each rank."""
    return (
        Rule(f"{ours}.weight", (f"{theirs}.weight",), axis),
        Rule(f"{ours}.bias", (f"{theirs}.bias",), 0 if axis == 0 else None),
    )


HF_RULES = RuleSet(
    (
        Vocab("embedding.word_embeddings.weight", ("model.decoder.embed_tokens.weight",), axis=0),
        Rule("position_embeddings.weight", ("model.decoder.embed_positions.weight",)),
        *_pair(LAYER + "input_layernorm", _HF_LAYER + "self_attn_layer_norm"),
        *(
            QKV(
                f"{ATTENTION}linear_qkv.{kind}",
                tuple(f"{_HF_LAYER}self_attn.{name}_proj.{kind}" for name in "qkv"),
                axis=0,
            )
            for kind in ("weight", "bias")
        ),
        *_pair(ATTENTION + "linear_proj", _HF_LAYER + "self_attn.out_proj", 1),
        *_pair(LAYER + "pre_mlp_layernorm", _HF_LAYER + "final_layer_norm"),
        *_pair(LAYER + "mlp.linear_fc1", _HF_LAYER + "fc1", 0),
        *_pair(LAYER + "mlp.linear_fc2", _HF_LAYER + "fc2", 1),
        *_pair("decoder.final_layernorm", "model.decoder.final_layer_norm"),
        Vocab("output_layer.weight", ("lm_head.weight",), axis=0),
    ),
    tied=TIED,
)


def shapes(spec: OptSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of our tensors; `{}` is the layer."""
    width, inner = spec.hidden_size, spec.ffn_hidden_size
    vocabulary = (spec.language_vocab_size, width)
    result = {
        "embedding.word_embeddings.weight": vocabulary,
        "position_embeddings.weight": (spec.max_position_embeddings + OFFSET, width),
        "output_layer.weight": vocabulary,
    }
    linears = {
        ATTENTION + "linear_qkv": (3 * width, width),
        ATTENTION + "linear_proj": (width, width),
        LAYER + "mlp.linear_fc1": (inner, width),
        LAYER + "mlp.linear_fc2": (width, inner),
    }
    for name, shape in linears.items():
        result |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in (LAYER + "input_layernorm", LAYER + "pre_mlp_layernorm", "decoder.final_layernorm"):
        result |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return result


PART = Part(
    name="opt",
    kind="text_decoder",
    model_types=FORMAT.model_types,
    keys=FORMAT.keys,
    Spec=OptSpec,
    from_hf=from_hf,
    to_hf=to_hf,
    rules={"hf": HF_RULES, "ours": HF_RULES.own()},
    shapes=shapes,
    build=build_decoder,
    checked=CHECKED,
)
