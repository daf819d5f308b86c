"""The specs of what is converted: what weights are, without what a run had set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from checkpoint_converters.targets import CHECKPOINT
from mindspeed_mm.models.describe import check_heads, describe_model, describe_part, part_of_source
from mindspeed_mm.models.part import SLOTS, PartSpec, part_block
from mindspeed_mm.models.spec import DEFAULT_FAMILY, load_model_spec
from mindspeed_mm.weights.layouts import OURS, VISION
from mindspeed_mm.weights.sources import PartSource, Source

RUN_KEYS = (
    *("freeze", "lr", "weight_decay", "layer_decay", "parameters", "lora", "quantize", "double_quant"),
    "neftune_noise_alpha",
    *("ckpt_path", "fresh", "params_dtype", "bf16", "fp16"),
    *("recompute_granularity", "recompute_method", "recompute_num_layers"),
)
"""Spec keys that say how a run used the part, which is nothing of the weights."""


def specs_of(source: Source, kinds: Sequence[str], num_attention_heads: int | None = None) -> dict[str, PartSpec]:
    """Specs of the named parts of a source, without what a run had set. A whole model is checked as one.

    Raises ConfigError where the vision encoder's config says another number of heads than `num_attention_heads`.
    """
    if VISION in kinds:
        check_heads(source, num_attention_heads)
    model = _model_config(source)
    whole = set(SLOTS) <= set(kinds)
    if model and whole:
        specs = load_model_spec(model, context=f"{source.path}: its model config").part_specs()
    elif whole:
        specs = describe_model(source, num_attention_heads=num_attention_heads).part_specs()
    else:
        heads = {"vision_encoder": num_attention_heads}
        specs = {kind: describe_part(source.part(kind), num_attention_heads=heads.get(kind)) for kind in kinds}
    return {kind: as_weights(source.part(kind), specs[kind]) for kind in kinds}


def family_of(source: Source) -> str:
    """model_id of the family that a source's model belongs to; the default one where it does not say."""
    return source.family or _model_config(source).get("model_id") or DEFAULT_FAMILY


def _model_config(source: Source) -> dict[str, Any]:
    """The model.json that a source of our own carries; empty where there is none."""
    config = source.config or {}
    return config["model"] if source.layout == CHECKPOINT else config if source.layout == OURS else {}


def as_weights(source: PartSource, spec: PartSpec) -> PartSpec:
    """A part's spec without what a run had set."""
    block = {k: v for k, v in part_block(source.part, spec).items() if k not in RUN_KEYS}
    return part_of_source(source).read_config(block, "ours")
