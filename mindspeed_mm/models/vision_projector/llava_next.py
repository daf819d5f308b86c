"""LLaVA-NeXT's projector: LLaVA's linears, then the tiles of an image put together, in its releases as one grid of
features with a learned vector at the end of each of its lines. Spec, weight rules.
"""

import ast
from dataclasses import replace
from typing import Annotated, Any, Literal

import pydantic

from mindspeed_mm.config.load import load_config
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.part import Part, Size, only
from mindspeed_mm.models.tiles import UNPAD
from mindspeed_mm.models.vision_projector import mlp
from mindspeed_mm.models.vision_projector.mlp import MlpSpec
from mindspeed_mm.weights.layouts import PROJECTOR, Layout, Prefix
from mindspeed_mm.weights.rules import Geometry, Rule, RuleSet

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
"""LlavaNextConfig's default of image_grid_pinpoints."""

MAX_PINPOINTS = 1024
"""More sizes than any released model offers; LLaVA-OneVision has 36."""


Pair = Annotated[list[Size], pydantic.Field(min_length=2, max_length=2)]
"""Height and width."""


class LlavaNextProjectorSpec(MlpSpec):
    """image_encoder.vision_projector block of a model.json."""

    independent_rows = False

    image_start_end: Annotated[Any, only(None, why="LLaVA-1.6 has no tokens around an image")] = None
    model_id: Literal["llava_next"] = "llava_next"
    image_grid_pinpoints: list[Pair] = pydantic.Field(min_length=1, max_length=MAX_PINPOINTS)
    """Height and width in pixels that an image may be resized to before it is cut into tiles, each a multiple of the
    vision encoder's image_size."""
    mm_patch_merge_type: Literal["spatial_unpad", "spatial", "flat"] = UNPAD
    """How the features of tiles are put together (models/tiles.py)."""

    @property
    def geometry(self) -> Geometry:
        return replace(super().geometry, image_newline=self.mm_patch_merge_type == UNPAD)


def pinpoints_of(config: dict[str, Any], *, width_first: bool) -> list[list[int]]:
    """image_grid_pinpoints of a config.json as [height, width], which original files have as (width, height).

    Raises ConfigError for what is no list of pairs, and where an original file has none: its code has no default.
    """
    found = config.get("image_grid_pinpoints", None if width_first else PINPOINTS)
    try:
        pairs = ast.literal_eval(found) if isinstance(found, str) else found
        if not all(len(pair) == 2 and all(type(side) is int for side in pair) for pair in pairs):
            raise ValueError("no pairs of integers")
    except (ValueError, SyntaxError, TypeError) as error:
        raise ConfigError(
            f"config.json: found image_grid_pinpoints {str(found)[:80]!r}; expected pairs of pixels such as "
            f"[[336, 672], [672, 336]] ({error}). Correct the file."
        ) from error
    return [list(reversed(pair)) if width_first else list(pair) for pair in pairs]


def from_hf(config: dict[str, Any]) -> LlavaNextProjectorSpec:
    """Spec of a LlavaNextConfig, or of an original config whose keys the family has filled in: pinpoints as [height,
    width], mm_patch_merge_type."""
    block = mlp.from_hf(config).model_dump(exclude={"model_id"}, exclude_unset=True)
    grids = {"image_grid_pinpoints": pinpoints_of(config, width_first=False)}
    grids["mm_patch_merge_type"] = config.get("mm_patch_merge_type", UNPAD)
    return load_config(LlavaNextProjectorSpec, block | grids, what="projector config")


def _with_newline(rules: RuleSet, prefix: str, newline: str) -> RuleSet:
    """The linears' rules under a prefix, and the newline vector."""
    linears = [replace(rule, sources=tuple(prefix + name for name in rule.sources)) for rule in rules.rules]
    return RuleSet((*linears, Rule("image_newline", (newline,), needs="image_newline")))


HF_RULES = _with_newline(mlp.HF_RULES, "multi_modal_projector.", "image_newline")
LLAVA_RULES = _with_newline(mlp.LLAVA_RULES, "mm_projector.", "image_newline")

PROJECTOR_ONLY = Layout(
    "projector",
    (r"(^|\.)mm_projector\.", r"^(model\.)?image_newline$"),
    (
        *(Prefix(f"{outer}mm_projector.", PROJECTOR, "mm_projector.") for outer in ("model.", "")),
        *(Prefix(f"{outer}image_newline", PROJECTOR, "image_newline") for outer in ("model.", "")),
    ),
    {PROJECTOR: "llava"},
)
"""Projector and newline vector alone, as the original training saves them."""


def shapes(spec: LlavaNextProjectorSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of our tensors."""
    newline = {"image_newline": (spec.hidden_size,)} if spec.geometry.image_newline else {}
    return mlp.shapes(spec) | newline


def build(spec: LlavaNextProjectorSpec, runtime):
    """The projector."""
    from mindspeed_mm.models.kit.llava_next import TileProjector

    return TileProjector(spec, runtime)


PART = Part(
    name="llava_next",
    kind="vision_projector",
    Spec=LlavaNextProjectorSpec,
    layouts=(PROJECTOR_ONLY,),
    to_hf=mlp.to_hf,
    from_hf=from_hf,
    rules={"llava": LLAVA_RULES, "hf": HF_RULES, "ours": LLAVA_RULES.own()},
    shapes=shapes,
    build=build,
    checked=(*mlp.PART.checked, "image_grid_pinpoints", "mm_patch_merge_type"),
)
