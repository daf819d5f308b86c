"""The whole model.json: a family, and parts found by their model_id, checked one by one and against each other."""

import functools
from pathlib import Path
from typing import Any

import pydantic

from mindspeed_mm.config.inherit import read_config
from mindspeed_mm.config.load import StrictModel, load_config
from mindspeed_mm.models import trainable
from mindspeed_mm.models.adapters import targets
from mindspeed_mm.models.adapters.saved_modules import with_opened
from mindspeed_mm.models.part import (
    ALL_SLOTS,
    DEFAULT_MODEL_IDS,
    Part,
    PartSpec,
    find_part,
    part_block,
    part_of,
)
from mindspeed_mm.registry import find, find_all

FAMILIES = "mindspeed_mm.models.families"
"""The package whose modules are the families of models."""

DEFAULT_FAMILY = "llava"
"""Family where a model.json gives no model_id."""


def find_family(model_id: str) -> Any:
    """The Family (models/family.py) of a model_id. Raises ConfigError for an unknown one, with the nearest."""
    return find(FAMILIES, model_id, "FAMILY", what="model_id")


def all_families() -> dict[str, Any]:
    """Every Family by its model_id."""
    return find_all(FAMILIES, "FAMILY")


class ImageEncoderSpec(StrictModel):
    """image_encoder block of a model.json."""

    vision_encoder: PartSpec
    vision_projector: PartSpec


class ModelSpec(StrictModel):
    """A whole model. Made by `load_model_spec`, which gives the blocks the Spec class of their model_id."""

    model_id: str = DEFAULT_FAMILY
    text_encoder: None = None
    video_encoder: None = None
    patch: dict[str, Any] | None = None
    image_encoder: ImageEncoderSpec
    text_decoder: PartSpec
    interaction: PartSpec | None = None

    @pydantic.field_validator("patch")
    @classmethod
    def _no_patch(cls, value: dict[str, Any] | None) -> None:
        if value:
            raise ValueError(
                f"found {', '.join(value)}; the ancestor's run-time patches do not exist here, remove them"
            )

    @pydantic.model_validator(mode="after")
    def _parts_fit(self) -> "ModelSpec":
        parts, specs = self.parts(), self.part_specs()
        problems = [*find_family(self.model_id).check(self), *targets.problems(parts, specs)]
        problems += trainable.problems(parts, specs)
        problems += _interaction_problems(self)
        if getattr(self.text_decoder, "cross_attention", None) is not None and not self.family.beside_text:
            problems.append(
                f"text_decoder.cross_attention: found one, and model_id {self.model_id} puts features into the text; "
                "expected none. Remove it, or set model_id flamingo"
            )
        if problems:
            raise ValueError("\n  ".join(problems))
        return self

    @property
    def family(self) -> Any:
        """The Family that the model belongs to."""
        return find_family(self.model_id)

    @property
    def vision_encoder(self) -> PartSpec:
        """Short for image_encoder.vision_encoder."""
        return self.image_encoder.vision_encoder

    @property
    def vision_projector(self) -> PartSpec:
        """Short for image_encoder.vision_projector."""
        return self.image_encoder.vision_projector

    def part(self, kind: str) -> PartSpec:
        """The spec of one slot."""
        return self.part_specs()[kind]

    def part_specs(self) -> dict[str, PartSpec]:
        """The specs by slot."""
        specs = {kind: getattr(self, kind) for kind in ALL_SLOTS}
        return {kind: spec for kind, spec in specs.items() if spec is not None}

    @property
    def adapter_files(self) -> tuple[str, ...]:
        """Where the parts' adapters are loaded from."""
        return tuple(part.lora.load for part in self.part_specs().values() if part.lora and part.lora.load)

    @property
    def asks_early(self) -> bool:
        """Whether nothing but the head reads the last layer, whose MLP may then leave out positions without a label."""
        return self.interaction is None and getattr(self.text_decoder, "cross_attention", None) is None

    def parts(self) -> dict[str, Part]:
        """The parts by slot."""
        return {kind: part_of(kind, spec) for kind, spec in self.part_specs().items()}


MODEL_KEYS = tuple(ModelSpec.model_fields)
"""Keys of a model.json; inference and evaluation files hold further ones beside them."""


def load_model_spec(source: str | Path | dict[str, Any], *, context: str | None = None) -> ModelSpec:
    """Check a model.json (a path or its parsed object, with no other keys than MODEL_KEYS) and return its ModelSpec.

    `context` names the file that a parsed object came from. Raises ConfigError with all problems and their JSON paths.
    """
    if not isinstance(source, dict):
        source, context = read_config(source), context or str(source)
    if isinstance(source.get("model_id"), str):
        find_family(source["model_id"])
    encoder = source.get("image_encoder")
    blocks = {"text_decoder": source, "vision_encoder": encoder, "vision_projector": encoder, "interaction": source}
    ids, opened = [], {}
    for kind, holder in blocks.items():
        block = holder.get(kind) if isinstance(holder, dict) else None
        model_id = block.get("model_id") if isinstance(block, dict) else None
        ids.append(model_id if isinstance(model_id, str) else DEFAULT_MODEL_IDS[kind])
        if isinstance(block, dict):
            opened[kind] = with_opened(block, find_part(kind, ids[-1]))
    source = {**source, **{kind: block for kind, block in opened.items() if blocks[kind] is source}}
    if isinstance(encoder, dict):
        source["image_encoder"] = {**encoder, **{kind: opened[kind] for kind in opened if blocks[kind] is encoder}}
    return load_config(_spec_class(*ids), source, what="model config", context=context)


def model_block(specs: dict[str, PartSpec], model_id: str = DEFAULT_FAMILY) -> dict[str, Any]:
    """A model.json of the given parts, by slot, with the values that differ from the defaults. A part that is not the
    default of its slot is named."""
    blocks = {kind: part_block(kind, spec) for kind, spec in specs.items()}
    outer = {kind: blocks.pop(kind) for kind in ("text_decoder", "interaction") if kind in blocks}
    image_encoder = blocks
    model: dict[str, Any] = {} if model_id == DEFAULT_FAMILY else {"model_id": model_id}
    model |= outer
    return {**model, "image_encoder": image_encoder} if image_encoder else model


@functools.lru_cache
def _spec_class(text_decoder: str, vision_encoder: str, vision_projector: str, interaction: str) -> type[ModelSpec]:
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
        interaction=(find_part("interaction", interaction).Spec | None, None),
    )


def _interaction_problems(spec: ModelSpec) -> list[str]:
    """Widths of the interaction that are not those of the parts on both of its sides."""
    own = spec.interaction
    if own is None:
        return []
    if spec.text_decoder.cross_shape is not None:
        return [
            "interaction: found one behind a text_decoder that attends to features beside its text; expected a decoder "
            "with features in its text. Remove it"
        ]
    read = spec.part(own.features)
    found = {
        "input_size": (own.input_size, read.feature_size, f"the {own.features}'s"),
        "hidden_size": (own.hidden_size, spec.text_decoder.hidden_size, "the text_decoder's"),
    }
    return [
        f"interaction.{key}: found {size}, expected {expected}, {whose} hidden_size; correct it, or leave it out"
        for key, (size, expected, whose) in found.items()
        if size != expected
    ]
