"""Llama decoder (Llama 1 to 3.x, Vicuna): spec, HF config and weight rules."""

from typing import Any, Literal

from mindspeed_mm.models.kit.cross_rules import cross_rules
from mindspeed_mm.models.kit.cross_spec import CrossDecoderSpec, with_cross_config, with_cross_shapes
from mindspeed_mm.models.kit.decoder_rules import CHECKED, HF_LAYER, LLAMA_RULES, build_decoder, shapes
from mindspeed_mm.models.kit.hf_config import HfFormat
from mindspeed_mm.models.part import Part


class LlamaSpec(CrossDecoderSpec):
    """text_decoder block of a model.json."""

    model_id: Literal["llama"] = "llama"


FORMAT = HfFormat(LlamaSpec, ("llama",), "LlamaForCausalLM")


def from_hf(config: dict[str, Any]) -> LlamaSpec:
    """LlamaSpec of an HF Llama config.json of any age.

    Raises ConfigError for another architecture and for variants that we do not build.
    """
    return FORMAT.spec_of(FORMAT.fill(config))


def to_hf(spec: LlamaSpec, dtype: str) -> dict[str, Any]:
    """config.json of an HF Llama; `dtype` as HF names it."""
    return FORMAT.write(spec, dtype, attention_bias=False, mlp_bias=False)


PART = Part(
    name="llama",
    kind="text_decoder",
    model_types=FORMAT.model_types,
    keys=FORMAT.keys,
    Spec=LlamaSpec,
    from_hf=with_cross_config(from_hf),
    to_hf=to_hf,
    rules=cross_rules(LLAMA_RULES, HF_LAYER),
    shapes=with_cross_shapes(shapes),
    build=build_decoder,
    checked=CHECKED,
    checked_where={"cross_attention": "cross_attention"},
)
