"""A model.json from weights at hand, so that nobody edits sizes by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoint_converters.checkpoint import register_checkpoints
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.describe import check_heads, describe_model, describe_part
from mindspeed_mm.models.part import ALL_SLOTS, PartSpec, find_part
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import DEFAULT_FAMILY, find_family, load_model_spec, model_block
from mindspeed_mm.weights.layouts import VISION
from mindspeed_mm.weights.sources import Source


def model_json_of(weights: Sequence[str | Path], *, num_attention_heads: int | None = None) -> dict[str, Any]:
    """The model.json of a whole model or of several parts, whose ckpt_path entries name the weights.

    Args:
        weights: folders or files in any readable layout. Of a slot that several hold, the first one counts. A projector
            that none holds is described as a new one between the given encoder and decoder.
        num_attention_heads: of a vision encoder whose source does not say it.

    Raises:
        WeightError: weights that cannot be read, or no decoder or vision encoder among them.
        ConfigError: parts that do not fit together; a source that says another number of heads.
    """
    register_checkpoints()
    sources = [(str(path), open_source(path)) for path in weights]
    whole = next((source for _, source in sources if source.family is not None), None)
    family = find_family(whole.family if whole is not None else DEFAULT_FAMILY)
    holders: dict[str, tuple[str, Source]] = {}
    for path, source in sources:
        for slot in source.parts:
            holders.setdefault(slot, (path, source))
    heads = {VISION: num_attention_heads}
    if VISION in holders:
        check_heads(holders[VISION][1], num_attention_heads)
    if whole is not None and len(sources) == 1 and set(family.slots) <= set(whole.parts):
        specs = describe_model(whole, num_attention_heads=num_attention_heads).part_specs()
    else:
        specs = {
            slot: describe_part(source.part(slot), num_attention_heads=heads.get(slot))
            for slot, (_, source) in holders.items()
        }
    _check_complete(specs, [path for path, _ in sources])
    if "vision_projector" not in specs:
        specs["vision_projector"] = _new_projector(family.model_ids.get("vision_projector", "mlp"), specs)
    block = model_block({slot: specs[slot] for slot in ALL_SLOTS if slot in specs}, family.name)
    for slot, (path, _) in holders.items():
        holder = block if slot in ("text_decoder", "interaction") else block["image_encoder"]
        holder[slot] = {**holder[slot], "ckpt_path": path}
    load_model_spec(block, context=", ".join(map(str, weights)))
    return block


def _check_complete(specs: dict[str, PartSpec], paths: Sequence[str]) -> None:
    missing = [slot for slot in ("text_decoder", "vision_encoder") if slot not in specs]
    if missing:
        raise WeightError(
            f"{', '.join(paths)} hold no {' and no '.join(missing)}; expected both (a projector may be new). Give the "
            "path of its weights, too."
        )


def _new_projector(model_id: str, specs: dict[str, PartSpec]) -> PartSpec:
    """A projector at random values between an encoder and a decoder."""
    sizes = {"input_size": specs["vision_encoder"].feature_size, "hidden_size": specs["text_decoder"].hidden_size}
    return find_part("vision_projector", model_id).read_config(sizes, "ours")
