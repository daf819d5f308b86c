"""MiniGPT-4's bridge without a Q-Former: a linear on some neighbouring patches of a row. Spec, weight rules.

The norm before it has no weights: the original reads those of its `ln_vision` from the Q-Former's file, which it does
not open here, so that its released weights were made with factors of 1.
"""

from typing import Annotated, Any, Literal

import pydantic

from mindspeed_mm.config.load import load_config
from mindspeed_mm.models.operations import EncoderWork, Product
from mindspeed_mm.models.part import Part, PartSpec, Size, only
from mindspeed_mm.weights.rules import Geometry, Rule, RuleSet


class PatchConcatSpec(PartSpec):
    """image_encoder.vision_projector block of a model.json."""

    independent_rows = False

    model_id: Literal["patch_concat"] = "patch_concat"
    fresh: bool = True
    """The linear is what training makes, so a null ckpt_path is normal."""
    input_size: Size
    """Width of the vision encoder."""
    hidden_size: Size
    """Width of the text decoder."""
    patches: Size = 4
    """Patches, one behind the other in reading order, that become one feature."""
    vision_norm_epsilon: Annotated[float, pydantic.Field(gt=0)] = 1e-5
    """Of the norm in front of the linear (ln_vision)."""
    feature_scale: Annotated[float, pydantic.Field(gt=0)] | None = None
    """Factor on the features behind the linear (see the family minigpt4); None: 1."""
    num_layers: Annotated[int, only(1, why="there is one linear")] = 1
    num_attention_heads: Annotated[int, only(1, why="the projector has no attention")] = 1
    ffn_hidden_size: Size = None  # hidden_size
    activation_func: Annotated[str, only("gelu", why="one linear has no activation")] = "gelu"
    gated_linear_unit: Annotated[bool, only(False, why="there is one linear")] = False
    add_bias_linear: Annotated[bool, only(True, why="the linear has a bias")] = True

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("ffn_hidden_size") is None:
            data = {**data, "ffn_hidden_size": data.get("hidden_size")}
        return data

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(input, output) of the linear."""
        return [(self.patches * self.input_size, self.hidden_size)]

    def products(self, work: EncoderWork) -> tuple[Product, ...]:
        """Each patch goes through the linear once, the class token does not; the norm keeps what it takes."""
        ((inputs, outputs),) = self.sizes
        rows = (work.positions - work.rows) / self.patches
        return (Product(rows, inputs, outputs, kept=work.positions * self.input_size),)

    @property
    def geometry(self) -> Geometry:
        return Geometry(num_layers=self.num_layers)


def from_hf(config: dict[str, Any]) -> PatchConcatSpec:
    """Spec of the config.json of a whole model in the family minigpt4's folders."""
    vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
    block = {
        "input_size": vision.get("hidden_size", 1408),
        "hidden_size": text.get("hidden_size", 4096),
        "patches": config.get("patches_per_feature", 4),
        "vision_norm_epsilon": config.get("vision_norm_eps", 1e-5),
        "feature_scale": config.get("feature_scale"),
    }
    return load_config(PatchConcatSpec, block, what="projector config")


RULES = RuleSet(
    tuple(Rule(f"linear_projection.{kind}", (f"llama_proj.{kind}",), 0) for kind in ("weight", "bias")),
)


def shapes(spec: PatchConcatSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of our tensors."""
    ((inputs, outputs),) = spec.sizes
    return {"linear_projection.weight": (outputs, inputs), "linear_projection.bias": (outputs,)}


def build(spec: PatchConcatSpec, runtime):
    """The projector."""
    from mindspeed_mm.models.kit.qformer import PatchConcat

    return PatchConcat(spec, runtime)


PART = Part(
    name="patch_concat",
    kind="vision_projector",
    Spec=PatchConcatSpec,
    from_hf=from_hf,
    rules={"hf": RULES, "lavis": RULES, "ours": RULES.own()},
    shapes=shapes,
    build=build,
    checked=("input_size", "hidden_size", "patches", "vision_norm_epsilon", "feature_scale"),
)
