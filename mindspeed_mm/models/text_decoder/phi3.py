"""Phi-3 decoder: Llama whose weights store queries, keys and values, and gate and up, as one tensor each; rotary
positions on a share of each head and LongRoPE where the config says so."""

from typing import Annotated, Any, Literal

import pydantic

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.kit.decoder_rules import ATTENTION, CHECKED, HF_LAYER, LAYER, build_decoder, hf_rules, shapes
from mindspeed_mm.models.kit.decoder_spec import DecoderTraits, WindowedSpec
from mindspeed_mm.models.kit.hf_config import HfFormat, read_rope
from mindspeed_mm.models.part import Part
from mindspeed_mm.weights.rules import Halves, PackedQKV


class Phi3Spec(WindowedSpec):
    """text_decoder block of a model.json."""

    model_id: Literal["phi3"] = "phi3"
    rotary_percent: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0
    """Share of a head's channels that is rotated, the first ones (HF's partial_rotary_factor)."""

    @property
    def traits(self) -> DecoderTraits:
        rotated = None if self.rotary_percent == 1.0 else int(self.kv_channels * self.rotary_percent)
        return DecoderTraits(windows=self.windows, rotary_channels=rotated)


FORMAT = HfFormat(
    Phi3Spec,
    ("phi3",),
    "Phi3ForCausalLM",
    defaults={
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "sliding_window": None,
    },
)


def from_hf(config: dict[str, Any]) -> Phi3Spec:
    """Phi3Spec of an HF Phi-3 config.json of any age. Raises ConfigError for what we do not build."""
    full = FORMAT.fill(config)
    for key in ("rope_parameters", "rope_scaling"):
        kind = (full.get(key) or {}).get("rope_type") or (full.get(key) or {}).get("type")
        if kind in ("su", "yarn"):  # what the first configs call longrope
            full[key] = {name: value for name, value in full[key].items() if name != "type"} | {"rope_type": "longrope"}
        elif kind not in (None, "default", "longrope"):
            raise ConfigError(f"{FORMAT.name}: found RoPE scaling of type {kind!r}; Phi-3 has default and longrope.")
    share = read_rope(full, FORMAT.name)[2]
    return FORMAT.spec_of(full, sliding_window=full["sliding_window"], rotary_percent=share)


def to_hf(spec: Phi3Spec, dtype: str) -> dict[str, Any]:
    """config.json of an HF Phi-3."""
    scaling = spec.rope_scaling
    original = scaling.original_max_position_embeddings if scaling else spec.max_position_embeddings
    written = FORMAT.write(
        spec,
        dtype,
        sliding_window=spec.sliding_window,
        partial_rotary_factor=spec.rotary_percent,
        original_max_position_embeddings=original,
    )
    if scaling:  # transformers of every age looks for "type" here
        written["rope_scaling"]["type"] = scaling.rope_type
    del written["head_dim"]  # Phi3Config has no such key: heads fill the width
    return written


HF_RULES = hf_rules(
    qkv=(PackedQKV(ATTENTION + "linear_qkv.weight", (HF_LAYER + "self_attn.qkv_proj.weight",), axis=0),),
    gate_up=Halves(LAYER + "mlp.linear_fc1.weight", (HF_LAYER + "mlp.gate_up_proj.weight",), axis=0),
)

PART = Part(
    name="phi3",
    kind="text_decoder",
    model_types=FORMAT.model_types,
    keys=FORMAT.keys,
    Spec=Phi3Spec,
    from_hf=from_hf,
    to_hf=to_hf,
    rules={"hf": HF_RULES, "ours": HF_RULES.own()},
    shapes=shapes,
    build=build_decoder,
    checked=CHECKED,
)
