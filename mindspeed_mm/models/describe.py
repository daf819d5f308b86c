"""The spec that weights themselves give: from the config beside them, else from their shapes."""

from typing import Any

from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.model_types import part_for_model_type
from mindspeed_mm.models.part import Part, PartSpec
from mindspeed_mm.models.spec import DEFAULT_MODEL_IDS, PART_KINDS, ModelSpec, find_part, load_model_spec
from mindspeed_mm.weights.configs import vision_select
from mindspeed_mm.weights.rules import Geometry, Rule, is_layered, layer_of
from mindspeed_mm.weights.sources import PartSource, Source


def part_of_source(source: PartSource) -> Part:
    """The part whose weights these are. Raises ConfigError for a model_type that no part reads."""
    config = source.config or {}
    if source.dialect == "hf" and source.part != "vision_projector" and isinstance(config.get("model_type"), str):
        return part_for_model_type(source.part, config["model_type"])
    model_id = config.get("model_id") if source.dialect == "ours" else None
    return find_part(source.part, model_id or DEFAULT_MODEL_IDS[source.part])


def describe_part(source: PartSource, **given: Any) -> PartSpec:
    """The Spec of one part of a source.

    `given` are Spec fields that the user states; they take the place of what the config says.
    Raises WeightError where there is no config and shapes do not suffice, ConfigError for unsupported values.
    """
    part = part_of_source(source)
    given = {key: value for key, value in given.items() if value is not None}
    if source.config is not None:
        spec = part.read_config(source.config, source.dialect)
        if not given:
            return spec
        derived = [key for key in ("num_query_groups", "kv_channels") if "num_attention_heads" in given]
        block = {**spec.model_dump(mode="json", exclude_defaults=True), **dict.fromkeys(derived), **given}
        return part.read_config(block, "ours")
    if part.from_shapes is None:
        raise WeightError(
            f"{source.path}: found no config.json beside the {source.part}; expected one, since shapes do not show its "
            "heads, norm and positions. Give the folder that holds config.json and weights."
        )
    layers = _count_layers(part, source)
    return part.from_shapes(lambda name: _our_shape(part, source, name, layers), layers, **given)


def describe_model(source: Source, **vision_encoder: Any) -> ModelSpec:
    """ModelSpec of a source that holds all parts.

    `vision_encoder` are fields of the vision encoder that the user states. A liuhaotian checkpoint whose vision encoder
    has no config beside it is described by the vision encoder's shapes. Raises WeightError when a part is not there.
    """
    specs = {kind: describe_part(source.part(kind)) for kind in PART_KINDS if kind != "vision_encoder"}
    if source.layout == "llava":
        config = source.config or {}
        layer = vision_select(config)["vision_feature_layer"]
        chosen = {"select_layer": layer, "select_feature": config.get("mm_vision_select_feature", "patch")}
        vision_encoder = chosen | vision_encoder
    specs["vision_encoder"] = describe_part(source.part("vision_encoder"), **vision_encoder)
    return load_model_spec(model_block(specs), context=str(source.path))


def model_block(specs: dict[str, PartSpec]) -> dict[str, Any]:
    """A model.json of the given parts, by kind, with the values that differ from the defaults."""
    blocks = {kind: spec.model_dump(mode="json", exclude_defaults=True) for kind, spec in specs.items()}
    image_encoder = {kind: block for kind, block in blocks.items() if kind != "text_decoder"}
    model = {"text_decoder": blocks["text_decoder"]} if "text_decoder" in blocks else {}
    return {**model, "image_encoder": image_encoder} if image_encoder else model


def _our_shape(part: Part, source: PartSource, target: str, layers: int) -> tuple[int, ...]:
    """Shape of a tensor of ours that a source holds unchanged."""
    name = part.rules[source.dialect].step_of(target, Geometry(max(layers, 1))).sources[0]
    if name not in source.names:
        raise WeightError(
            f"{source.path}: tensor {name} is missing; expected the weights of a {part.name}. Give a complete file."
        )
    return source.shape(name)


def _count_layers(part: Part, source: PartSource) -> int:
    """Layers that a source holds: the largest number of one, plus one."""
    patterns = {
        name
        for rule in part.rules[source.dialect].rules
        if isinstance(rule, Rule) and is_layered(rule.target)
        for name in rule.sources
    }
    found = [layer_of(pattern, name) for pattern in patterns for name in source.names]
    return max((layer + 1 for layer in found if layer is not None), default=0)
