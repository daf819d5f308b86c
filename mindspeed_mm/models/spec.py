"""The whole model.json: parts found by their model_id, checked one by one and against each other."""

import functools
from pathlib import Path
from typing import Any, Literal

import pydantic

from mindspeed_mm.config.load import StrictModel, load_config, read_json
from mindspeed_mm.models.part import Part, PartSpec
from mindspeed_mm.registry import find

PART_KINDS = ("text_decoder", "vision_encoder", "vision_projector")

DEFAULT_MODEL_IDS = {"text_decoder": "llama", "vision_encoder": "clip", "vision_projector": "mlp"}
"""Implementation where a block gives no model_id (the ancestor's text_decoder has none)."""


class ImageEncoderSpec(StrictModel):
    """image_encoder block of a model.json."""

    vision_encoder: PartSpec
    vision_projector: PartSpec


class ModelSpec(StrictModel):
    """A whole model. Made by `load_model_spec`, which gives the three blocks the Spec class of their model_id."""

    model_id: Literal["llava"] = "llava"
    text_encoder: None = None
    video_encoder: None = None
    patch: dict[str, Any] | None = None
    image_encoder: ImageEncoderSpec
    text_decoder: PartSpec

    @pydantic.field_validator("patch")
    @classmethod
    def _no_patch(cls, value: dict[str, Any] | None) -> None:
        if value:
            raise ValueError(
                f"found {', '.join(value)}; the ancestor's run-time patches do not exist here, remove them"
            )

    @pydantic.model_validator(mode="after")
    def _parts_fit(self) -> "ModelSpec":
        vision_encoder, projector = self.image_encoder.vision_encoder, self.image_encoder.vision_projector
        problems = []
        if projector.input_size != vision_encoder.hidden_size:
            problems.append(
                f"image_encoder.vision_projector.input_size: found {projector.input_size}, expected "
                f"{vision_encoder.hidden_size}, the vision_encoder's hidden_size"
            )
        if projector.hidden_size != self.text_decoder.hidden_size:
            problems.append(
                f"image_encoder.vision_projector.hidden_size: found {projector.hidden_size}, expected "
                f"{self.text_decoder.hidden_size}, the text_decoder's hidden_size"
            )
        if vision_encoder.num_image_tokens >= self.text_decoder.language_max_sequence_length:
            problems.append(
                f"text_decoder.language_max_sequence_length: found {self.text_decoder.language_max_sequence_length}, "
                f"expected more than the {vision_encoder.num_image_tokens} tokens of one image"
            )
        if problems:
            raise ValueError("\n  ".join(problems))
        return self

    @property
    def vision_encoder(self) -> PartSpec:
        """Short for image_encoder.vision_encoder."""
        return self.image_encoder.vision_encoder

    @property
    def vision_projector(self) -> PartSpec:
        """Short for image_encoder.vision_projector."""
        return self.image_encoder.vision_projector

    def part(self, kind: str) -> PartSpec:
        """The spec of one kind of part."""
        return self.part_specs()[kind]

    def part_specs(self) -> dict[str, PartSpec]:
        """The three specs by kind."""
        return {kind: getattr(self, kind) for kind in PART_KINDS}

    def parts(self) -> dict[str, Part]:
        """The three parts by kind."""
        return {kind: part_of(kind, spec) for kind, spec in self.part_specs().items()}


MODEL_KEYS = tuple(ModelSpec.model_fields)
"""Keys of a model.json; inference and evaluation files hold further ones beside them."""


def find_part(kind: str, model_id: str) -> Part:
    """The part of one kind and name. Raises ConfigError for an unknown name, with the nearest one."""
    return find(f"mindspeed_mm.models.{kind}", model_id, "PART", what=f"{kind} model_id")


def part_of(kind: str, spec: PartSpec) -> Part:
    """The part that a spec belongs to."""
    return find_part(kind, spec.model_id)


def load_model_spec(source: str | Path | dict[str, Any], *, context: str | None = None) -> ModelSpec:
    """Check a model.json (a path or its parsed object, with no other keys than MODEL_KEYS) and return its ModelSpec.

    `context` names the file that a parsed object came from. Raises ConfigError with all problems and their JSON paths.
    """
    if not isinstance(source, dict):
        source, context = read_json(source), context or str(source)
    encoder = source.get("image_encoder")
    blocks = {"text_decoder": source, "vision_encoder": encoder, "vision_projector": encoder}
    ids = []
    for kind, holder in blocks.items():
        block = holder.get(kind) if isinstance(holder, dict) else None
        model_id = block.get("model_id") if isinstance(block, dict) else None
        ids.append(model_id if isinstance(model_id, str) else DEFAULT_MODEL_IDS[kind])
    return load_config(_spec_class(*ids), source, what="model config", context=context)


@functools.lru_cache
def _spec_class(text_decoder: str, vision_encoder: str, vision_projector: str) -> type[ModelSpec]:
    """ModelSpec with the Spec classes of these parts, so that unknown keys find their nearest known one."""
    encoder = pydantic.create_model(
        "ImageEncoderSpec",
        __base__=ImageEncoderSpec,
        vision_encoder=(find_part("vision_encoder", vision_encoder).Spec, ...),
        vision_projector=(find_part("vision_projector", vision_projector).Spec, ...),
    )
    return pydantic.create_model(
        "ModelSpec",
        __base__=ModelSpec,
        image_encoder=(encoder, ...),
        text_decoder=(find_part("text_decoder", text_decoder).Spec, ...),
    )
