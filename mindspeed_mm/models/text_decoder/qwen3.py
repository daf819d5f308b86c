"""Qwen3 decoder: Llama with norms on queries and keys and a head size of its own."""

from typing import Any, Literal

from mindspeed_mm.models.kit.decoder_rules import CHECKED, PRE_MLP_NORM, QK_NORMS, build_decoder, hf_rules, shapes
from mindspeed_mm.models.kit.decoder_spec import DecoderTraits, WindowedSpec
from mindspeed_mm.models.kit.hf_config import WINDOW_DEFAULTS, HfFormat, read_windows, written_windows
from mindspeed_mm.models.part import Part


class Qwen3Spec(WindowedSpec):
    """text_decoder block of a model.json."""

    model_id: Literal["qwen3"] = "qwen3"

    @property
    def traits(self) -> DecoderTraits:
        return DecoderTraits(windows=self.windows, qk_norm=True)


FORMAT = HfFormat(
    Qwen3Spec,
    ("qwen3",),
    "Qwen3ForCausalLM",
    defaults={
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        **WINDOW_DEFAULTS,
    },
)


def from_hf(config: dict[str, Any]) -> Qwen3Spec:
    """Qwen3Spec of an HF Qwen3 config.json of any age. Raises ConfigError for what we do not build."""
    full = FORMAT.fill(config)
    return FORMAT.spec_of(full, **read_windows(full))


def to_hf(spec: Qwen3Spec, dtype: str) -> dict[str, Any]:
    """config.json of an HF Qwen3."""
    return FORMAT.write(spec, dtype, attention_bias=False, **written_windows(spec))


HF_RULES = hf_rules(norms=(*QK_NORMS, *PRE_MLP_NORM))

PART = Part(
    name="qwen3",
    kind="text_decoder",
    model_types=FORMAT.model_types,
    keys=FORMAT.keys,
    Spec=Qwen3Spec,
    from_hf=from_hf,
    to_hf=to_hf,
    rules={"hf": HF_RULES, "ours": HF_RULES.own()},
    shapes=shapes,
    build=build_decoder,
    checked=CHECKED,
)
