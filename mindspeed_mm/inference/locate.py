"""Finds what belongs to a model at a path: spec, weight sources, tokenizer, image processor, template."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_converters.checkpoint import register_checkpoints
from checkpoint_converters.companions import SAVED_TOKENIZER
from mindspeed_mm.config.inherit import read_config
from mindspeed_mm.data.tokenizer_keys import GENERATION_NAME
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models.complete import read_model
from mindspeed_mm.models.describe import describe_model
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import DEFAULT_FAMILY, MODEL_KEYS, ModelSpec, find_family, load_model_spec
from mindspeed_mm.weights.layouts import OURS
from mindspeed_mm.weights.sources import Source, errors_name

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FOLDER = SAVED_TOKENIZER


@dataclass(frozen=True)
class Located:
    """A whole model. `sources` opens each part's weights; None where the spec's ckpt_path says where they are."""

    path: Path
    spec: ModelSpec
    sources: dict[str, Source] | None
    image_token_id: int | None = None
    placeholder_ids: tuple[int, ...] = ()
    """All ids that stand for features in given input ids."""
    tokenizer: Path | None = None
    image_processor: Path | dict[str, Any] | None = None
    template: str | None = None
    """The one that a training checkpoint says it was trained with."""
    generation: Path | None = None
    """The folder with the model's own generation_config.json, where another one's tokenizer was asked for."""
    pad: bool = True
    """Pad images to squares, as LLaVA-1.5 does (its image_aspect_ratio "pad")."""


def locate(path: Path, *, tokenizer: str | Path | None = None, image_processor: str | Path | None = None) -> Located:
    """Recognise a model by its contents.

    Raises:
        WeightError: the path holds no whole model, or holds damaged weights.
        ConfigError: the spec of the model is missing or wrong.
    """
    register_checkpoints()
    if path.suffix == ".json" and path.is_file():
        found = _from_model_json(path)
    else:
        found = locate_source(open_source(path), path)
    return Located(
        **(
            vars(found)
            | ({"tokenizer": Path(tokenizer), "generation": _generation(found)} if tokenizer else {})
            | ({"image_processor": Path(image_processor)} if image_processor else {})
        )
    )


def _generation(found: Located) -> Path | None:
    own = (found.path, found.tokenizer)
    return next((folder for folder in own if folder is not None and (folder / GENERATION_NAME).is_file()), None)


def _from_model_json(path: Path) -> Located:
    values = {key: value for key, value in read_config(path).items() if key in MODEL_KEYS}
    spec = read_model(values, context=str(path))
    return Located(
        path,
        spec,
        None,
        tokenizer=_beside(spec.text_decoder.ckpt_path, TOKENIZER_FILES) or _holding(path.parent, TOKENIZER_FILES),
        image_processor=_beside(spec.vision_encoder.ckpt_path, PROCESSOR_FILES)
        or _holding(path.parent, PROCESSOR_FILES),
        pad=spec.family.pads({}),
    )


def locate_source(source: Source, path: Path) -> Located:
    """A whole model of opened weights; `path` is what they are called. Raises as `locate` does."""
    own = source.layout in (OURS, "checkpoint")
    model = source.config.get("model", source.config) if own and source.config else {}
    family = find_family(source.family or model.get("model_id", DEFAULT_FAMILY))
    missing = [slot for slot in family.slots if slot not in source.parts]
    if missing:
        if missing[0] in source.advice or source.layout == "projector":
            source.part(missing[0])  # raises, with the reason that fits the layout
        raise WeightError(_apart(source, missing))
    sources = dict.fromkeys(source.parts, source)
    if source.family is not None:
        return _of_family(family, path, source, sources)
    if source.layout == "checkpoint":
        return _checkpoint(path, source, sources)
    if source.layout == OURS and source.config:
        spec = load_model_spec(source.config, context=str(path / "model.json"))
        return Located(
            path,
            spec,
            sources,
            tokenizer=_holding(path, TOKENIZER_FILES),
            image_processor=_holding(path, PROCESSOR_FILES),
            pad=spec.family.pads({}),
        )
    raise WeightError(
        f"{path}: found layout {source.layout}, which does not say the model's architecture; give a model.json whose "
        "ckpt_path entries name these weights instead"
    )


FLAGS = {
    "text_decoder": "--text-decoder DECODER",
    "vision_encoder": "--vision-encoder ENCODER",
    "vision_projector": "--projector PROJECTOR",
}
"""Of `mindspeed-mm convert`: a part, and a word for its path."""


def _apart(source: Source, missing: list[str]) -> str:
    """What to do with weights that are a part of a model."""
    words = " ".join(
        f"{flag.split()[0]} {source.path}" if slot in source.parts else flag for slot, flag in FLAGS.items()
    )
    return (
        f"{source.path}: found layout {source.layout} with {', '.join(source.parts)}; expected a whole model, with a "
        f"{' and a '.join(missing)}. Join it with the others: mindspeed-mm convert {words} TARGET --to llava, then "
        "give TARGET; or name each by ckpt_path in a model.json."
    )


def _of_family(family: Any, path: Path, source: Source, sources: dict[str, Source]) -> Located:
    config = _config(path, source)
    spec = describe_model(source)
    processor = _holding(source.part("vision_encoder").path, PROCESSOR_FILES) or _holding(path, PROCESSOR_FILES)
    if processor is None and source.layout != family.layouts[0].name:  # folders of transformers hold their own
        processor = family.default_image_processor(spec)
    with errors_name(path):
        return Located(
            path,
            spec,
            sources,
            image_token_id=family.image_token_id(config),
            placeholder_ids=family.placeholder_ids(config),
            tokenizer=_holding(path, TOKENIZER_FILES),
            image_processor=processor,
            pad=family.pads(config),
        )


def _checkpoint(path: Path, source: Source, sources: dict[str, Source]) -> Located:
    extra = _config(path, source)
    data, spec = extra.get("data", {}), load_model_spec(extra["model"], context=f"{source.path}: model in run.json")
    return Located(
        path,
        spec,
        sources,
        tokenizer=_holding(source.path.parent / TOKENIZER_FOLDER, TOKENIZER_FILES) or _path(data.get("tokenizer")),
        image_processor=data.get("image_processor"),
        template=data.get("template"),
        pad=bool(data.get("pad", spec.family.pads({}))),
    )


def _config(path: Path, source: Source) -> dict[str, Any]:
    if not source.config:
        raise ConfigError(f"{path}: config.json is missing; copy it from where the weights come from")
    return source.config


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _holding(folder: Path, names: tuple[str, ...]) -> Path | None:
    return folder if any((folder / name).is_file() for name in names) else None


def _beside(weights: str | None, names: tuple[str, ...]) -> Path | None:
    """The folder of some weights, or the one around them, where it holds one of the files."""
    if weights is None:
        return None
    return _holding(Path(weights), names) or _holding(Path(weights).parent, names)
