"""Qwen2-VL's and Qwen2.5-VL's merger: a norm, then each square of patches as one feature through two linears. Spec,
weight rules."""

from dataclasses import replace
from typing import Annotated, Any, Literal

import pydantic

from mindspeed_mm.config.load import load_config
from mindspeed_mm.models.operations import EncoderWork, Product
from mindspeed_mm.models.part import Part, Size, only
from mindspeed_mm.models.vision_projector import mlp
from mindspeed_mm.models.vision_projector.mlp import MlpSpec, TokenId
from mindspeed_mm.weights.rules import Rule, RuleSet


class PatchMergerSpec(MlpSpec):
    """image_encoder.vision_projector block of a model.json."""

    independent_rows = False

    model_id: Literal["patch_merger"] = "patch_merger"
    fresh: bool = False
    num_layers: Annotated[int, only(2, why="the merger has two linears")] = 2
    activation_func: Annotated[str, only("gelu", why="the merger has GELU (erf)")] = "gelu"
    add_bias_linear: Annotated[bool, only(True, why="the merger's linears have biases")] = True
    spatial_merge_size: Size = 2
    """Patches along a side of the square that becomes one feature."""
    ffn_hidden_size: Size = None  # input_size x the patches of a square
    """Width between the linears."""
    image_token_id: TokenId = 151655
    video_token_id: TokenId = 151656
    """Tokens that stand for features in the input ids of transformers' processor."""
    vision_start_token_id: TokenId = 151652
    vision_end_token_id: TokenId = 151653
    """Tokens before and behind the features of an image."""
    image_start_end: Annotated[Any, only(None, why="vision_start_token_id and vision_end_token_id say it")] = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """The width between the linears, where it is not given."""
        if isinstance(data, dict) and data.get("ffn_hidden_size") is None:
            width, merge = data.get("input_size"), data.get("spatial_merge_size", 2)
            if type(width) is int and type(merge) is int:
                return {**data, "ffn_hidden_size": width * merge**2}
        return data

    @pydantic.model_validator(mode="after")
    def _inside_is_a_square(self) -> "PatchMergerSpec":
        wanted = self.input_size * self.spatial_merge_size**2
        if self.ffn_hidden_size != wanted:
            raise ValueError(
                f"ffn_hidden_size {self.ffn_hidden_size} is not input_size {self.input_size} x "
                f"{self.spatial_merge_size} x {self.spatial_merge_size} patches = {wanted}; leave it out"
            )
        return self

    def products(self, work: EncoderWork) -> tuple[Product, ...]:
        """The norm before the linears keeps its input."""
        first, *others = super().products(work)
        return replace(first, activated=work.positions * self.input_size), *others

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(input, output) of each linear."""
        return [(self.ffn_hidden_size, self.ffn_hidden_size), (self.ffn_hidden_size, self.hidden_size)]


TOKEN_KEYS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def from_hf(config: dict[str, Any]) -> PatchMergerSpec:
    """Spec of the vision_config of a Qwen2_5_VLConfig, with the config's own token ids beside."""
    block = {
        "input_size": config.get("hidden_size", 3584),
        "hidden_size": config.get("out_hidden_size", 3584),
        "spatial_merge_size": config.get("spatial_merge_size", 2),
        **{key: config[key] for key in TOKEN_KEYS if key in config},
    }
    return load_config(PatchMergerSpec, block, what="projector config")


HF_RULES = RuleSet(
    (
        Rule("norm.weight", ("ln_q.weight",)),
        *(
            replace(rule, sources=tuple(f"mlp.{name}" for name in rule.sources))
            for rule in mlp.LLAVA_RULES.rules  # numbers 0 and 2 of an nn.Sequential, as here
        ),
    )
)


def shapes(spec: PatchMergerSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of our tensors."""
    return {**mlp.shapes(spec), "norm.weight": (spec.input_size,)}


def build(spec: PatchMergerSpec, runtime):
    """The projector."""
    from mindspeed_mm.models.kit.linears import PatchMerger

    return PatchMerger(spec, runtime)


PART = Part(
    name="patch_merger",
    kind="vision_projector",
    Spec=PatchMergerSpec,
    from_hf=from_hf,
    rules={"hf": HF_RULES, "ours": HF_RULES.own()},
    shapes=shapes,
    build=build,
    checked=("input_size", "hidden_size", "spatial_merge_size"),
)
