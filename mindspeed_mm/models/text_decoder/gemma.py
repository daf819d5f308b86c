"""Gemma decoder: norms with the factor 1 + weight, scaled word embeddings, GeGLU with GELU's tanh form."""

from typing import Annotated, Any, Literal

from mindspeed_mm.models.kit.decoder_rules import CHECKED, LLAMA_RULES, build_decoder, shapes
from mindspeed_mm.models.kit.decoder_spec import DecoderSpec, DecoderTraits
from mindspeed_mm.models.kit.hf_config import HfFormat
from mindspeed_mm.models.part import Part, only


class GemmaSpec(DecoderSpec):
    """text_decoder block of a model.json."""

    model_id: Literal["gemma"] = "gemma"
    activation_func: Annotated[str, only("gelu_pytorch_tanh", why="Gemma's MLP is GeGLU in its tanh form")] = (
        "gelu_pytorch_tanh"
    )
    layernorm_zero_centered_gamma: Annotated[bool, only(True, why="Gemma's norms multiply by 1 + weight")] = True
    share_embeddings_and_output_weights: bool = True

    @property
    def traits(self) -> DecoderTraits:
        return DecoderTraits(zero_centered_norm=True, embedding_scale=self.hidden_size**0.5)


FORMAT = HfFormat(
    GemmaSpec,
    ("gemma",),
    "GemmaForCausalLM",
    defaults={
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": None,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
)


def from_hf(config: dict[str, Any]) -> GemmaSpec:
    """GemmaSpec of an HF Gemma config.json of any age: the first ones say hidden_act "gelu" and mean the tanh form.

    Raises ConfigError for what we do not build."""
    full = FORMAT.fill(config)
    key = "hidden_activation" if full["hidden_activation"] else "hidden_act"
    activation = "gelu_pytorch_tanh" if full[key] == "gelu" else full[key]
    return FORMAT.spec_of(full, {"activation_func": key}, activation_func=activation)


def to_hf(spec: GemmaSpec, dtype: str) -> dict[str, Any]:
    """config.json of an HF Gemma."""
    return FORMAT.write(spec, dtype, hidden_activation=spec.activation_func, attention_bias=False)


PART = Part(
    name="gemma",
    kind="text_decoder",
    model_types=FORMAT.model_types,
    keys=FORMAT.keys,
    Spec=GemmaSpec,
    from_hf=from_hf,
    to_hf=to_hf,
    rules={"hf": LLAMA_RULES, "ours": LLAMA_RULES.own()},
    shapes=shapes,
    build=build_decoder,
    checked=CHECKED,
)
