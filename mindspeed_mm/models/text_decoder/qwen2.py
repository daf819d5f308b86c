"""Qwen2 and Qwen2.5 decoder: Llama with biases on queries, keys and values, windows on the upper layers where the
config asks for them, and multimodal rotary positions in the VL models."""

from typing import Annotated, Any, Literal

import pydantic

from mindspeed_mm.models.kit.decoder_rules import CHECKED, LLAMA_RULES, build_decoder, shapes
from mindspeed_mm.models.kit.decoder_spec import DecoderTraits, WindowedSpec
from mindspeed_mm.models.kit.hf_config import WINDOW_DEFAULTS, HfFormat, read_windows, written_windows
from mindspeed_mm.models.part import Part, Size


class Qwen2Spec(WindowedSpec):
    """text_decoder block of a model.json."""

    model_id: Literal["qwen2"] = "qwen2"
    add_qkv_bias: bool = True
    mrope_section: Annotated[tuple[Size, Size, Size], pydantic.Strict(False)] | None = None
    """Pairs of channels of a head that turn by time, height and width (Qwen2-VL, Qwen2.5-VL); None: by one position."""

    @property
    def traits(self) -> DecoderTraits:
        return DecoderTraits(windows=self.windows, mrope_section=self.mrope_section)


VL_DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_window_layers": 80,
    "rope_theta": 1000000.0,
}
"""transformers' Qwen2VLTextConfig and Qwen2_5_VLTextConfig."""

FORMAT = HfFormat(
    Qwen2Spec,
    ("qwen2", "qwen2_vl_text", "qwen2_5_vl_text"),
    "Qwen2ForCausalLM",
    defaults={
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        **WINDOW_DEFAULTS,
    },
    type_defaults={"qwen2_vl_text": VL_DEFAULTS, "qwen2_5_vl_text": VL_DEFAULTS},
)


def from_hf(config: dict[str, Any]) -> Qwen2Spec:
    """Qwen2Spec of an HF Qwen2 config.json of any age, or of the text part of Qwen2-VL's and Qwen2.5-VL's.

    Raises ConfigError for what we do not build."""
    full = FORMAT.fill(config)
    sections = None
    for key in ("rope_parameters", "rope_scaling"):
        if full.get(key):
            full[key] = dict(full[key])
            sections = full[key].pop("mrope_section", None) or sections
            for name in ("type", "rope_type"):
                if full[key].get(name) == "mrope":  # the name before transformers 4.45, for unscaled rotation
                    full[key][name] = "default"
    return FORMAT.spec_of(full, **read_windows(full), mrope_section=sections)


def to_hf(spec: Qwen2Spec, dtype: str) -> dict[str, Any]:
    """config.json of an HF Qwen2, or the text_config of a Qwen2-VL where it has multimodal rotary positions."""
    written = FORMAT.write(spec, dtype, **written_windows(spec))
    if spec.mrope_section is not None:
        scaling = written["rope_scaling"] or {"rope_type": "default", "type": "default"}
        written["rope_scaling"] = {**scaling, "mrope_section": list(spec.mrope_section)}
    return written


PART = Part(
    name="qwen2",
    kind="text_decoder",
    model_types=FORMAT.model_types,
    keys=FORMAT.keys,
    Spec=Qwen2Spec,
    from_hf=from_hf,
    to_hf=to_hf,
    rules={"hf": LLAMA_RULES, "ours": LLAMA_RULES.own()},
    shapes=shapes,
    build=build_decoder,
    checked=CHECKED,
)
