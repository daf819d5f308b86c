"""config.json of the layouts that are written, as far as conversions add to what families and parts state."""

from pathlib import Path
from typing import Any

from mindspeed_mm.models.llava_config import LLAVA_DEFAULTS, ORIGINAL
from mindspeed_mm.models.part import PartSpec, part_of
from mindspeed_mm.weights.sources import Source

TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def hf_config(kind: str, spec: PartSpec, dtype: str) -> dict[str, Any]:
    """config.json of one part as stock transformers reads it."""
    return part_of(kind, spec).to_hf(spec, dtype)


def text_tokens(source: Source) -> dict[str, Any]:
    """Ids of the special tokens, where the source's config has them."""
    part = source.part_sources.get("text_decoder")
    config = (part.config if part else None) or {}
    return {key: config[key] for key in TOKEN_KEYS if isinstance(config.get(key), int | list)}


def original_config(config: dict[str, Any], specs: dict[str, PartSpec], source: Source, encoder: str) -> dict[str, Any]:
    """config.json of LLaVA's original layout: `config` is the family's; `encoder` is its mm_vision_tower."""
    own = dict(source.config or {}) if source.layout == ORIGINAL else {}
    return {
        **LLAVA_DEFAULTS,
        "tokenizer_model_max_length": specs["text_decoder"].language_max_sequence_length,
        **own,
        **config,
        "mm_vision_tower": encoder,
    }


def own_encoder_name(source: Source) -> str | None:
    """The hub name by which a liuhaotian source calls its vision encoder; None where it is a path."""
    name = (source.config or {}).get("mm_vision_tower") if source.layout == ORIGINAL else None
    known = isinstance(name, str) and name and not (source.path / name).exists() and not Path(name).is_absolute()
    return name if known and not name.startswith(".") else None
