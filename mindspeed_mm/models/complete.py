"""A model.json that leaves out what its weights say: `{"text_decoder": {"ckpt_path": "internlm2-chat-7b"}, ...}`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mindspeed_mm.config.inherit import read_config
from mindspeed_mm.config.options import ConfigFile
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.describe import describe_part
from mindspeed_mm.models.part import DEFAULT_MODEL_IDS, PartSpec, part_block
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import DEFAULT_FAMILY, ModelSpec, find_family, load_model_spec
from mindspeed_mm.weights.layouts import INTERACTION, PROJECTOR, TEXT, VISION


def read_model(source: str | Path | ConfigFile | dict[str, Any], *, context: str | None = None) -> ModelSpec:
    """The ModelSpec of a model.json, as `load_model_spec` gives it, its blocks completed first.

    A text_decoder or vision_encoder with a ckpt_path and without num_layers takes all that it leaves out from the
    weights; the keys that it has count. A projector without sizes lies between the two; what the whole model around its
    weights states (tokens around an image) is taken, too. An interaction has the decoder's sizes.

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
    if isinstance(model.get(INTERACTION), dict) and isinstance(encoder, dict):
        model[INTERACTION] = _around(model[INTERACTION], model, encoder)
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
    family = model.get("model_id", DEFAULT_FAMILY)
    family = find_family(family) if isinstance(family, str) else None
    beside = family is not None and family.beside_text  # features as wide as the encoder's
    widths = {"input_size": encoder.get(VISION), "hidden_size": encoder.get(VISION) if beside else model.get(TEXT)}
    found = {key: width for key, holder in widths.items() if (width := _width(holder)) is not None}
    default = None if family is None else family.model_ids.get(PROJECTOR)
    named = {} if default in (None, DEFAULT_MODEL_IDS[PROJECTOR]) else {"model_id": default}
    return {
        **named,
        **found,
        **_stated(encoder[PROJECTOR].get("ckpt_path"), _adapter_files(model)),
        **encoder[PROJECTOR],
    }


def _width(block: Any) -> Any:
    """Width of what a part's block gives, as far as it says one: of an encoder with several layers in select_layer,
    that of their hidden states side by side."""
    if not isinstance(block, dict) or "hidden_size" not in block:
        return None
    size, layers = block["hidden_size"], block.get("select_layer")
    return size * len(layers) if isinstance(size, int) and isinstance(layers, list) else size


def _around(block: dict[str, Any], model: dict[str, Any], encoder: dict[str, Any]) -> dict[str, Any]:
    """The interaction's block with the sizes that it leaves out: the decoder's, and the width of what it looks at."""
    decoder, features = model.get(TEXT), block.get("features", VISION)
    read = encoder.get(features) if isinstance(features, str) else None
    keys = ("hidden_size", "ffn_hidden_size", "num_attention_heads")
    found = {key: decoder[key] for key in keys if isinstance(decoder, dict) and key in decoder}
    width = {} if (size := _width(read)) is None else {"input_size": size}
    stated = {}
    if isinstance(block.get("ckpt_path"), str) and block["ckpt_path"]:
        own = open_source(block["ckpt_path"], adapters=_adapter_files(model)).part(INTERACTION)
        stated = part_block(INTERACTION, describe_part(own)) if own.config is not None else {}
        stated = {key: value for key, value in stated.items() if key not in PartSpec.model_fields}  # a run's own
    return {**found, **width, **stated, **block}


def _adapter_files(model: dict[str, Any]) -> list[str]:
    """Where the decoder's adapters are loaded from, as far as the block says it well."""
    lora = model[TEXT].get("lora") if isinstance(model.get(TEXT), dict) else None
    return [lora["load"]] if isinstance(lora, dict) and isinstance(lora.get("load"), str) else []


def _stated(weights: Any, adapters: list[str]) -> dict[str, Any]:
    """What the whole model that a projector's weights lie in states about it beside its sizes."""
    if not isinstance(weights, str) or not Path(weights).exists():
        return {}
    source = open_source(weights, adapters=adapters)
    stated = {} if source.family is None else find_family(source.family).stated(source).get(PROJECTOR, {})
    return {key: value for key, value in stated.items() if value is not None}
