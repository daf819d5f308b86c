"""The spec that weights themselves give: from the config beside them, else from their shapes."""

from typing import Any

from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models.part import DEFAULT_MODEL_IDS, Part, PartSpec, find_part, part_block, part_for_model_type
from mindspeed_mm.models.spec import DEFAULT_FAMILY, ModelSpec, find_family, load_model_spec, model_block
from mindspeed_mm.weights.layouts import INTERACTION, VISION
from mindspeed_mm.weights.rule_names import is_layered, layer_of
from mindspeed_mm.weights.rules import Geometry, Rule
from mindspeed_mm.weights.sources import PartSource, Source, errors_name


def part_of_source(source: PartSource) -> Part:
    """The part whose weights these are. Raises ConfigError where its config names a model_type that no part reads."""
    config = source.config or {}
    if source.dialect == "ours":
        return find_part(source.part, config.get("model_id") or DEFAULT_MODEL_IDS[source.part])
    if source.part in ("text_decoder", "vision_encoder") and isinstance(config.get("model_type"), str):
        return part_for_model_type(source.part, config["model_type"])
    return find_part(source.part, source.model_id or DEFAULT_MODEL_IDS[source.part])


def describe_part(source: PartSource, **given: Any) -> PartSpec:
    """The Spec of one part of a source.

    `given` are Spec fields that the user states; they take the place of what the config says.
    Raises WeightError where there is no config and shapes do not suffice, ConfigError for unsupported values.
    """
    with errors_name(source.path):
        return _described(source, {key: value for key, value in given.items() if value is not None})


def _described(source: PartSource, given: dict[str, Any]) -> PartSpec:
    part = part_of_source(source)
    if source.config is not None:
        spec = part.read_config(source.config, source.dialect)
        if not given:
            return spec
        derived = [key for key in ("num_query_groups", "kv_channels") if key in part.Spec.model_fields]
        derived = derived if "num_attention_heads" in given else []
        return part.read_config({**part_block(source.part, spec), **dict.fromkeys(derived), **given}, "ours")
    if part.from_shapes is None:
        raise WeightError(
            f"{source.path}: found no config.json beside the {source.part}; expected one, since shapes do not show its "
            "heads, norm and positions. Give the folder that holds config.json and weights."
        )
    layers = _count_layers(part, source)
    return part.from_shapes(lambda name: _our_shape(part, source, name, layers), layers, **given)


def describe_model(source: Source, **vision_encoder: Any) -> ModelSpec:
    """ModelSpec of a source that holds all parts.

    `vision_encoder` are fields of the vision encoder that the user states. Fields that the family's own config states
    about a part without a config come next. Raises WeightError when a part is not there.
    """
    family = find_family(source.family or DEFAULT_FAMILY)
    with errors_name(source.path):
        stated = {slot: dict(fields) for slot, fields in family.stated(source).items()}
    stated["vision_encoder"] = {**stated.get("vision_encoder", {}), **vision_encoder}
    specs = {slot: describe_part(source.part(slot), **stated.get(slot, {})) for slot in held_slots(family, source)}
    return load_model_spec(model_block(specs, family.name), context=str(source.path))


def check_heads(source: Source, given: int | None) -> None:
    """Raise ConfigError where what lies beside the weights of a vision encoder says another number of heads.

    `given` is the command's --num-attention-heads; None where it was not given.
    """
    part = source.part(VISION)
    if given is None or part.config is None or "num_attention_heads" in part.assumed:
        return
    found = describe_part(part).num_attention_heads
    if found == given:
        return
    inside, key = part.config, "num_attention_heads"
    for outer in (source.config or {}, part.config):
        for name in ("vision_config", "vision_config_dict"):  # the second is of old CLIPs, and goes before the first
            if isinstance(outer.get(name), dict) and (name == "vision_config" or "num_attention_heads" in outer[name]):
                inside, key = outer[name], f"{name}.num_attention_heads"
    if "num_heads" in inside:  # Qwen2.5-VL
        key = key.replace("num_attention_heads", "num_heads")
    config = part.path / "config.json"
    said = f"{key} {found}" if key.rpartition(".")[2] in inside else f"no {key}, which stands for {found},"
    again = f"convert the weights again with --num-attention-heads {given}"  # our record lies inside a file
    cure = again if part.dialect == "ours" else f"correct {key} there"
    raise ConfigError(
        f"{config if config.is_file() else part.path}: found {said} and --num-attention-heads {given}; expected the "
        f"same number of heads. Leave --num-attention-heads out, or {cure} if the weights have {given} heads"
    )


def held_slots(family: Any, source: Source) -> tuple[str, ...]:
    """The slots of a family's model, and the interaction where a source has one."""
    return (*family.slots, *(slot for slot in source.parts if slot == INTERACTION))


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
