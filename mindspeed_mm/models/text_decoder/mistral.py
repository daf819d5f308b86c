"""Mistral decoder: Llama with a sliding window on every layer."""

from typing import Any, Literal

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.kit.decoder_rules import CHECKED, LLAMA_RULES, build_decoder, shapes
from mindspeed_mm.models.kit.decoder_spec import WindowedSpec
from mindspeed_mm.models.kit.hf_config import HfFormat
from mindspeed_mm.models.part import Part


class MistralSpec(WindowedSpec):
    """text_decoder block of a model.json."""

    model_id: Literal["mistral"] = "mistral"


FORMAT = HfFormat(
    MistralSpec,
    ("mistral",),
    "MistralForCausalLM",
    defaults={
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
)


def from_hf(config: dict[str, Any]) -> MistralSpec:
    """MistralSpec of an HF Mistral config.json of any age. Raises ConfigError for what we do not build."""
    full = FORMAT.fill(config)
    return FORMAT.spec_of(full, sliding_window=full["sliding_window"])


def to_hf(spec: MistralSpec, dtype: str) -> dict[str, Any]:
    """config.json of an HF Mistral, whose window holds on all layers or on none.

    Raises ConfigError where it holds on some."""
    windows = set(spec.windows)
    if len(windows) > 1:
        raise ConfigError(
            f"text_decoder.layer_types: found {list(spec.layer_types)}; a Mistral config.json has one window for all "
            "layers. Leave layer_types out, or keep the layout mindspeed-mm."
        )
    return FORMAT.write(spec, dtype, sliding_window=next(iter(windows), None))


PART = Part(
    name="mistral",
    kind="text_decoder",
    model_types=FORMAT.model_types,
    keys=FORMAT.keys,
    Spec=MistralSpec,
    from_hf=from_hf,
    to_hf=to_hf,
    rules={"hf": LLAMA_RULES, "ours": LLAMA_RULES.own()},
    shapes=shapes,
    build=build_decoder,
    checked=CHECKED,
)
