"""Llama decoder (Llama 1 to 3.x, Vicuna): spec, HF config and weight rules."""

from typing import Any, Literal

from mindspeed_mm.models.kit.decoder_rules import CHECKED, LLAMA_RULES, build_decoder, shapes
from mindspeed_mm.models.kit.decoder_spec import DecoderSpec
from mindspeed_mm.models.kit.hf_config import HfFormat
from mindspeed_mm.models.part import Part


class LlamaSpec(DecoderSpec):
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
    from_hf=from_hf,
    to_hf=to_hf,
    rules={"hf": LLAMA_RULES, "ours": LLAMA_RULES.own()},
    shapes=shapes,
    build=build_decoder,
    checked=CHECKED,
)
