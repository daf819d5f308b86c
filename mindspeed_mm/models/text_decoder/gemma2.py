"""Gemma 2 decoder: Gemma with norms behind attention and MLP, capped scores and logits, and a window on every second
layer."""

from typing import Annotated, Any, Literal

from mindspeed_mm.models.kit.decoder_rules import ATTENTION, CHECKED, HF_LAYER, LAYER, build_decoder, hf_rules, shapes
from mindspeed_mm.models.kit.decoder_spec import DecoderTraits, LayerTypes, Positive, WindowedSpec
from mindspeed_mm.models.kit.hf_config import HfFormat
from mindspeed_mm.models.part import Part, only
from mindspeed_mm.weights.rules import Rule


def alternating(layers: int) -> LayerTypes:
    """Gemma 2's kinds of layers."""
    return tuple(("sliding_attention", "full_attention")[number % 2] for number in range(layers))


class Gemma2Spec(WindowedSpec):
    """text_decoder block of a model.json."""

    model_id: Literal["gemma2"] = "gemma2"
    activation_func: Annotated[str, only("gelu_pytorch_tanh", why="Gemma's MLP is GeGLU in its tanh form")] = (
        "gelu_pytorch_tanh"
    )
    layernorm_zero_centered_gamma: Annotated[bool, only(True, why="Gemma's norms multiply by 1 + weight")] = True
    share_embeddings_and_output_weights: bool = True
    query_pre_attn_scalar: Positive = 256.0
    """Scores are divided by its square root."""
    attn_logit_softcapping: Positive | None = 50.0
    """Bound of the scores, cap * tanh(score / cap); null: none."""
    final_logit_softcapping: Positive | None = 30.0
    """Bound of the logits."""

    def default_layer_types(self) -> LayerTypes:
        """A window on the first layer and every second one from there."""
        return alternating(self.num_layers)

    @property
    def traits(self) -> DecoderTraits:
        return DecoderTraits(
            windows=self.windows,
            attention_soft_cap=self.attn_logit_softcapping,
            final_soft_cap=self.final_logit_softcapping,
            attention_scale=self.query_pre_attn_scalar**-0.5,
            zero_centered_norm=True,
            post_norms=True,
            embedding_scale=self.hidden_size**0.5,
        )


OWN_KEYS = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "sliding_window")

FORMAT = HfFormat(
    Gemma2Spec,
    ("gemma2",),
    "Gemma2ForCausalLM",
    defaults={
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",  # not looked at: see hidden_activation
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "layer_types": None,
    },
)


def from_hf(config: dict[str, Any]) -> Gemma2Spec:
    """Gemma2Spec of an HF Gemma 2 config.json of any age. Raises ConfigError for what we do not build."""
    full = FORMAT.fill(config)
    own = {key: full[key] for key in OWN_KEYS}
    if full["layer_types"] != list(alternating(full["num_hidden_layers"])):
        own["layer_types"] = full["layer_types"]
    names = {"activation_func": "hidden_activation"}
    return FORMAT.spec_of(full, names, activation_func=full["hidden_activation"], **own)


def to_hf(spec: Gemma2Spec, dtype: str) -> dict[str, Any]:
    """config.json of an HF Gemma 2."""
    own = {key: getattr(spec, key) for key in OWN_KEYS}
    if spec.query_pre_attn_scalar.is_integer():  # transformers 5 takes no other
        own["query_pre_attn_scalar"] = int(spec.query_pre_attn_scalar)
    kinds = spec.layer_types or spec.default_layer_types()
    own |= {"hidden_activation": spec.activation_func, "layer_types": list(kinds), "attention_bias": False}
    return FORMAT.write(spec, dtype, **own)


HF_RULES = hf_rules(
    norms=(
        Rule(ATTENTION + "post_layernorm.weight", (HF_LAYER + "post_attention_layernorm.weight",)),
        Rule(LAYER + "pre_mlp_layernorm.weight", (HF_LAYER + "pre_feedforward_layernorm.weight",)),
        Rule(LAYER + "mlp.post_layernorm.weight", (HF_LAYER + "post_feedforward_layernorm.weight",)),
    )
)

PART = Part(
    name="gemma2",
    kind="text_decoder",
    model_types=FORMAT.model_types,
    keys=FORMAT.keys,
    Spec=Gemma2Spec,
    from_hf=from_hf,
    to_hf=to_hf,
    rules={"hf": HF_RULES, "ours": HF_RULES.own()},
    shapes=shapes,
    build=build_decoder,
    checked=CHECKED,
)
