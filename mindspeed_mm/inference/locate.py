"""Finds what belongs to a model at a path: spec, weight sources, tokenizer, image processor, template."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_converters.checkpoint import register_checkpoints
from checkpoint_converters.companions import SAVED_TOKENIZER
from checkpoint_converters.configs import image_processor_config
from mindspeed_mm.config.load import read_json
from mindspeed_mm.data.template import get_template
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models.describe import describe_model
from mindspeed_mm.models.spec import MODEL_KEYS, ModelSpec, load_model_spec
from mindspeed_mm.weights.sources import Source, open_source

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FOLDER = SAVED_TOKENIZER

DEFAULT_TEMPLATE = "v1"
"""The template that LLaVA-1.5 is tuned with."""


@dataclass(frozen=True)
class Located:
    """A whole model. `sources` opens each part's weights; None where the spec's ckpt_path says where they are."""

    path: Path
    spec: ModelSpec
    sources: dict[str, Source] | None
    image_token_id: int | None = None
    tokenizer: Path | None = None
    image_processor: Path | dict[str, Any] | None = None
    template: str = DEFAULT_TEMPLATE
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
        found = _from_source(path, open_source(path))
    return Located(
        **(
            vars(found)
            | ({"tokenizer": Path(tokenizer)} if tokenizer else {})
            | ({"image_processor": Path(image_processor)} if image_processor else {})
        )
    )


def _from_model_json(path: Path) -> Located:
    values = {key: value for key, value in read_json(path).items() if key in MODEL_KEYS}
    spec = load_model_spec(values, context=str(path))
    return Located(
        path,
        spec,
        None,
        tokenizer=_beside(spec.text_decoder.ckpt_path, TOKENIZER_FILES) or _holding(path.parent, TOKENIZER_FILES),
        image_processor=_beside(spec.vision_encoder.ckpt_path, PROCESSOR_FILES)
        or _holding(path.parent, PROCESSOR_FILES),
    )


def _from_source(path: Path, source: Source) -> Located:
    missing = [part for part in ("text_decoder", "vision_encoder", "vision_projector") if part not in source.parts]
    if missing:
        source.part(missing[0])  # raises, with the reason that fits the layout
    sources = dict.fromkeys(source.parts, source)
    if source.layout == "llava-hf":
        return _llava_hf(path, source, sources)
    if source.layout == "llava":
        return _llava(path, source, sources)
    if source.layout == "checkpoint":
        return _checkpoint(path, source, sources)
    if source.layout == "mindspeed-mm" and source.config:
        spec = load_model_spec(source.config, context=str(path / "model.json"))
        return Located(
            path,
            spec,
            sources,
            tokenizer=_holding(path, TOKENIZER_FILES),
            image_processor=_holding(path, PROCESSOR_FILES),
        )
    raise WeightError(
        f"{path}: found layout {source.layout}, which does not say the model's architecture; give a model.json whose "
        "ckpt_path entries name these weights instead"
    )


def _llava_hf(path: Path, source: Source, sources: dict[str, Source]) -> Located:
    config = _config(path, source)
    image_token = config.get("image_token_index", config.get("image_token_id"))
    return Located(
        path,
        describe_model(source),
        sources,
        image_token_id=32000 if image_token is None else image_token,  # LlavaConfig's default
        tokenizer=_holding(path, TOKENIZER_FILES),
        image_processor=_holding(path, PROCESSOR_FILES),
    )


def _llava(path: Path, source: Source, sources: dict[str, Source]) -> Located:
    config = _config(path, source)
    vision_encoder = config.get("mm_vision_tower")
    if source.part("vision_encoder").config is None:
        if str(vision_encoder).startswith((".", "/")):
            raise WeightError(
                f"{path}: the config of the vision encoder {vision_encoder!r} is not there; "
                "put the vision encoder's folder at that path (relative to this folder)"
            )
        # A name of the hub, whose vision encoders are CLIP releases: shapes show all but the heads.
        logger.info(
            "%s: no config of the vision encoder %r is here; its heads are taken as its width / 64",
            path,
            vision_encoder,
        )
    spec = describe_model(source)
    folder = path / str(config.get("mm_vision_tower"))
    processor = _holding(folder, PROCESSOR_FILES) or _holding(path, PROCESSOR_FILES)
    return Located(
        path,
        spec,
        sources,
        tokenizer=_holding(path, TOKENIZER_FILES),
        image_processor=processor or image_processor_config(spec.vision_encoder),
        pad=config.get("image_aspect_ratio", "square") == "pad",
    )


def _checkpoint(path: Path, source: Source, sources: dict[str, Source]) -> Located:
    extra = _config(path, source)
    data = extra.get("data", {})
    return Located(
        path,
        load_model_spec(extra["model"], context=f"{source.path}: model in run.json"),
        sources,
        tokenizer=_holding(source.path.parent / TOKENIZER_FOLDER, TOKENIZER_FILES) or _path(data.get("tokenizer")),
        image_processor=data.get("image_processor"),
        template=_chat_template(data.get("template")),
        pad=bool(data.get("pad", True)),
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


def _chat_template(trained: str | None) -> str:
    """Template of the answers: the one of training, unless that knows captions only (stage 1)."""
    if trained is None or get_template(trained).captions_only:
        return DEFAULT_TEMPLATE
    return trained
