"""LLaVA-1.5's projector: Linear, GELU (erf), Linear, all with biases. Spec and weight rules."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import pydantic

from mindspeed_mm.config.load import load_config
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.part import Part, PartSpec, Size, only
from mindspeed_mm.weights.rules import Geometry, Rule, RuleSet


class MlpSpec(PartSpec):
    """image_encoder.vision_projector block of a model.json."""

    model_id: Literal["mlp"] = "mlp"
    fresh: bool = True
    """The projector is what pretraining makes, so a null ckpt_path is normal."""
    num_layers: Annotated[int, only(2, why="the projector is mlp2x_gelu")] = 2
    num_attention_heads: Annotated[int, only(1, why="the projector has no attention")] = 1
    input_size: Size
    """Width of the vision encoder."""
    ffn_hidden_size: Size = None  # hidden_size, as LLaVA has it
    hidden_size: Size
    """Width of the text decoder."""
    activation_func: Annotated[str, only("gelu", why="the projector is mlp2x_gelu")] = "gelu"
    gated_linear_unit: Annotated[bool, only(False, why="the projector is mlp2x_gelu")] = False
    add_bias_linear: Annotated[bool, only(True, why="the projector's linears have biases")] = True

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("ffn_hidden_size") is None:
            data = {**data, "ffn_hidden_size": data.get("hidden_size")}
        return data

    @property
    def geometry(self) -> Geometry:
        return Geometry(num_layers=self.num_layers)


def from_hf(config: dict[str, Any]) -> MlpSpec:
    """MlpSpec of a llava-hf config (text_config and vision_config inside) or of an original LLaVA config (mm_* keys).

    Raises ConfigError for another projector.
    """
    if "mm_projector_type" in config or "mm_hidden_size" in config:
        kind = config.get("mm_projector_type", "linear")  # LLaVA's builder: absent means linear
        if kind != "mlp2x_gelu":
            raise ConfigError(f'projector config: found mm_projector_type "{kind}"; mlp2x_gelu is supported.')
        if "mm_hidden_size" not in config:
            raise ConfigError("projector config: mm_hidden_size is missing; add the width of the vision tower.")
        sizes = (config["mm_hidden_size"], config.get("hidden_size", 4096))
    else:
        activation = config.get("projector_hidden_act", "gelu")
        if activation != "gelu" or not config.get("multimodal_projector_bias", True):
            raise ConfigError(
                f"projector config: found activation {activation!r} and bias "
                f"{config.get('multimodal_projector_bias', True)}; gelu with biases is supported."
            )
        sizes = (
            config.get("vision_config", {}).get("hidden_size", 768),
            config.get("text_config", {}).get("hidden_size", 4096),
        )
    return load_config(MlpSpec, {"input_size": sizes[0], "hidden_size": sizes[1]}, what="projector config")


def from_shapes(shape: Callable[[str], tuple[int, ...]], num_layers: int, **given: Any) -> MlpSpec:
    """MlpSpec of weights without a config (`num_layers` is the 0 that a part without layers has)."""
    ffn_size, input_size = shape("encoder.linear_fc1.weight")
    hidden_size = shape("encoder.linear_fc2.weight")[0]
    sizes = {"input_size": input_size, "ffn_hidden_size": ffn_size, "hidden_size": hidden_size}
    return load_config(MlpSpec, {**sizes, **given}, what="projector (from the shapes of its weights)")


def _rules(first: str, second: str) -> RuleSet:
    return RuleSet(
        (
            Rule("encoder.linear_fc1.weight", (f"{first}.weight",), axis=0),
            Rule("encoder.linear_fc1.bias", (f"{first}.bias",), axis=0),
            Rule("encoder.linear_fc2.weight", (f"{second}.weight",), axis=1),
            Rule("encoder.linear_fc2.bias", (f"{second}.bias",)),
        )
    )


LLAVA_RULES = _rules("0", "2")
HF_RULES = _rules("linear_1", "linear_2")


def build(spec: MlpSpec, runtime):
    """The projector."""
    from mindspeed_mm.models.modules.mlp import MLPProjector

    return MLPProjector(spec, runtime)


PART = Part(
    name="mlp",
    kind="vision_projector",
    Spec=MlpSpec,
    from_hf=from_hf,
    from_shapes=from_shapes,
    rules={"llava": LLAVA_RULES, "hf": HF_RULES, "ours": LLAVA_RULES.own()},
    build=build,
    checked=("input_size", "hidden_size"),
)
