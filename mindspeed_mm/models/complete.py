"""A model.json that leaves out what its weights say: `{"text_decoder": {"ckpt_path": "internlm2-chat-7b"}, ...}`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mindspeed_mm.config.inherit import read_config
from mindspeed_mm.config.options import ConfigFile
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.describe import describe_part
from mindspeed_mm.models.part import DEFAULT_MODEL_IDS, part_block
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import DEFAULT_FAMILY, ModelSpec, find_family, load_model_spec
from mindspeed_mm.weights.layouts import PROJECTOR, TEXT, VISION


def read_model(source: str | Path | ConfigFile | dict[str, Any], *, context: str | None = None) -> ModelSpec:
    """The ModelSpec of a model.json, as `load_model_spec` gives it, its blocks completed first.

    A text_decoder or vision_encoder with a ckpt_path and without num_layers takes all that it leaves out from the
    weights; the keys that it has count. A projector without sizes lies between the two.

    Raises:
        ConfigError: as load_model_spec; a model_id that is not that of the weights.
        WeightError: weights that cannot be read, or that do not say what is left out.
    """
    if not isinstance(source, dict):
        source, context = read_config(source), context or str(source)
    model, encoder = dict(source), source.get("image_encoder")
    if _is_short(model.get(TEXT)):
        model[TEXT] = _completed(TEXT, model[TEXT], context)
    if isinstance(encoder, dict):
        model["image_encoder"] = encoder = dict(encoder)
        if _is_short(encoder.get(VISION)):
            encoder[VISION] = _completed(VISION, encoder[VISION], context)
        if isinstance(encoder.get(PROJECTOR), dict):
            encoder[PROJECTOR] = _between(model, encoder)
    return load_model_spec(model, context=context)


def _is_short(block: Any) -> bool:
    return isinstance(block, dict) and isinstance(block.get("ckpt_path"), str) and "num_layers" not in block


def _completed(slot: str, block: dict[str, Any], context: str | None) -> dict[str, Any]:
    given = {key: block[key] for key in ("num_attention_heads",) if key in block}  # what is derived of it follows
    spec = describe_part(open_source(block["ckpt_path"]).part(slot), **given)
    if block.get("model_id", spec.model_id) != spec.model_id:
        raise ConfigError(
            f'model config{f" ({context})" if context else ""}: {slot}.model_id is "{block["model_id"]}", the weights '
            f'{block["ckpt_path"]} are those of a "{spec.model_id}"; correct one of them, or leave model_id out'
        )
    return {**part_block(slot, spec), **block}


def _between(model: dict[str, Any], encoder: dict[str, Any]) -> dict[str, Any]:
    """The projector's block with the widths that it leaves out."""
    widths = {"input_size": encoder.get(VISION), "hidden_size": model.get(TEXT)}
    found = {
        key: holder["hidden_size"]
        for key, holder in widths.items()
        if isinstance(holder, dict) and "hidden_size" in holder
    }
    family = model.get("model_id", DEFAULT_FAMILY)
    default = find_family(family).model_ids.get(PROJECTOR) if isinstance(family, str) else None
    named = {} if default in (None, DEFAULT_MODEL_IDS[PROJECTOR]) else {"model_id": default}
    return {**named, **found, **encoder[PROJECTOR]}
