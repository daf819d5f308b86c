"""EVA-CLIP's vision transformer (Sun et al. 2023) as BLIP-2, InstructBLIP and MiniGPT-4 have it: spec, HF config and
weight rules.

Every position is a feature, the class token's among them, and there is no norm behind the last layer: that norm belongs
to the projector (`ln_vision`). Queries and values have biases, keys have none.
Letters: H width, F MLP size, P positions.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import pydantic
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mindspeed_mm.config.file_keys import COMMON, NO_CONFIG, OLD_OPTIONS, file_keys
from mindspeed_mm.config.load import load_config
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models.kit.encoder_spec import LAYER as _LAYER
from mindspeed_mm.models.kit.encoder_spec import EncoderSpec, linear_shapes, norm_shapes, pair
from mindspeed_mm.models.operations import LayerShape
from mindspeed_mm.models.part import Part, Size, only
from mindspeed_mm.weights.layouts import VISION, Layout, Prefix
from mindspeed_mm.weights.rules import QKV, Drop, Geometry, PackedQKV, Reshape, RuleSet

logger = logging.getLogger(__name__)

KEYS = {
    "num_layers": ("num_hidden_layers", 39),
    "hidden_size": ("hidden_size", 1408),
    "ffn_hidden_size": ("intermediate_size", 6144),
    "num_attention_heads": ("num_attention_heads", 16),
    "patch_size": ("patch_size", 14),
    "image_size": ("image_size", 224),
    "activation_func": ("hidden_act", "gelu"),
    "layernorm_epsilon": ("layer_norm_eps", 1e-6),
    "attention_dropout": ("attention_dropout", 0.0),
}
"""Our keys, HF's, and the value where a config.json has none (transformers' Blip2VisionConfig)."""

CONFIG_KEYS = file_keys(
    "EVA-ViT vision encoder config",
    (*(theirs for theirs, _ in KEYS.values()), "qkv_bias", "dtype", "torch_dtype"),
    {**NO_CONFIG, "dropout": (0,)},
    (*COMMON, *OLD_OPTIONS, "projection_dim", "num_channels"),
)
"""Of a Blip2VisionConfig or InstructBlipVisionConfig."""

MODEL_TYPES = ("blip_2_vision_model", "instructblip_vision_model")

HEAD_CHANNELS = 88
"""Channels of a head of ViT-g/14; its file does not show them."""


@dataclass(frozen=True)
class EvaGeometry(Geometry):
    """A Geometry that knows the positions of an image."""

    positions: int = 257


class EvaSpec(EncoderSpec):
    """image_encoder.vision_encoder block of a model.json."""

    architecture = "EVA-CLIP"

    model_id: Literal["eva_vit"] = "eva_vit"
    patch_size: Size = 14
    image_size: Size = 224
    """Weights of another size are taken, too: their position embedding is interpolated."""
    num_channels: Annotated[int, only(3, why="images are RGB")] = 3
    add_class_token: Annotated[bool, only(True, why="EVA-CLIP has a class token")] = True
    class_token_len: Annotated[int, only(1, why="EVA-CLIP has one class token")] = 1
    activation_func: Annotated[str, only("gelu", why="EVA-CLIP has GELU (erf)")] = "gelu"
    gated_linear_unit: Annotated[bool, only(False, why="EVA-CLIP's MLP has no gate")] = False
    add_bias_linear: Annotated[bool, only(True, why="EVA-CLIP's linears have biases")] = True
    add_qkv_bias: Annotated[bool, only(True, why="EVA-CLIP's queries and values have biases")] = True
    normalization: Annotated[str, only("LayerNorm", why="EVA-CLIP has LayerNorm")] = "LayerNorm"
    layernorm_epsilon: Annotated[float, pydantic.Field(gt=0)] = 1e-6
    post_layer_norm: Annotated[bool, only(False, why="the norm behind the last layer is the projector's")] = False

    @pydantic.model_validator(mode="before")
    @classmethod
    def _derive(cls, data: Any) -> Any:
        return cls.derived(data)

    @pydantic.model_validator(mode="after")
    def _shapes_fit(self) -> "EvaSpec":
        self.check_heads()
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        self.check_stages()
        return self

    @property
    def layer(self) -> LayerShape:
        return replace(super().layer, rotary=False)

    @property
    def num_positions(self) -> int:
        """The class token and the patches."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def num_image_tokens(self) -> int:
        """Vectors that one image gives to the projector."""
        return self.num_positions

    @property
    def geometry(self) -> EvaGeometry:
        return EvaGeometry(
            num_layers=self.num_layers,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            kv_channels=self.kv_channels,
            positions=self.num_positions,
        )


def from_hf(config: dict[str, Any]) -> EvaSpec:
    """EvaSpec of an HF Blip2VisionConfig or InstructBlipVisionConfig. Raises ConfigError for another architecture."""
    kind = config.get("model_type", MODEL_TYPES[0])
    if kind not in MODEL_TYPES:
        raise ConfigError(f'vision encoder config: found model_type "{kind}"; expected {" or ".join(MODEL_TYPES)}.')
    CONFIG_KEYS.check(config)
    if not config.get("qkv_bias", True):
        raise ConfigError("vision encoder config: found qkv_bias false; expected true, as in the released models.")
    block = {ours: config.get(theirs, default) for ours, (theirs, default) in KEYS.items()}
    dtype = {"params_dtype": config.get("dtype") or config.get("torch_dtype")}
    names = {ours: theirs for ours, (theirs, _) in KEYS.items()}
    return load_config(EvaSpec, block | dtype, what="vision encoder config", names=names)


def to_hf(spec: EvaSpec, dtype: str) -> dict[str, Any]:
    """The vision_config of an HF Blip2Config; `dtype` as HF names it."""
    written = {theirs: getattr(spec, ours) for ours, (theirs, _) in KEYS.items()}
    return {"model_type": MODEL_TYPES[0], **written, "qkv_bias": True, "torch_dtype": dtype}


def from_shapes(shape: Callable[[str], tuple[int, ...]], num_layers: int, **given: Any) -> EvaSpec:
    """EvaSpec of the public file eva_vit_g.pth, whose last layer none of these models has."""
    width, _, patch, _ = shape("conv1.weight")
    block = {
        "num_layers": num_layers - 1,
        "hidden_size": width,
        "ffn_hidden_size": shape(f"{_LAYER.format(0)}mlp.linear_fc1.weight")[0],
        "num_attention_heads": max(1, width // HEAD_CHANNELS),
        "patch_size": patch,
        "image_size": math.isqrt(shape("position_embeddings.weight")[1] - 1) * patch,
    }
    return load_config(EvaSpec, block | given, what="vision encoder (from the shapes of its weights)")


@dataclass(frozen=True)
class Positions(Reshape):
    """Our [P, H] is the source's [1, P, H], interpolated where the source was made for images of another size.

    The class token's position stays; those of the patches are resized as an image (bicubic), as LAVIS and transformers
    do it.
    """

    def to_ours(self, tensors: list[Tensor], geometry: EvaGeometry) -> Tensor:
        stored, wanted = tensors[0].flatten(0, -2), geometry.positions
        if len(stored) == wanted:
            return stored
        sides = math.isqrt(len(stored) - 1), math.isqrt(wanted - 1)
        if sides[0] ** 2 != len(stored) - 1:
            raise WeightError(
                f"{self.sources[0]} has {len(stored)} positions; expected a class token and a square of patches. Give "
                "weights of a model for square images."
            )
        if stored.is_meta:
            return torch.empty(wanted, stored.shape[1], dtype=stored.dtype, device="meta")
        logger.info("positions of %d x %d patches are interpolated to %d x %d", *(sides[0],) * 2, *(sides[1],) * 2)
        grid = stored[1:].float().view(1, sides[0], sides[0], -1).permute(0, 3, 1, 2)
        grid = interpolate(grid, size=(sides[1], sides[1]), mode="bicubic", align_corners=False)
        patches = grid.permute(0, 2, 3, 1).reshape(wanted - 1, -1).to(stored.dtype)
        return torch.cat((stored[:1], patches))

    def to_theirs(self, tensor: Tensor, geometry: EvaGeometry) -> list[Tensor]:
        return [tensor.unsqueeze(0)]


@dataclass(frozen=True)
class BiasWithoutKeys(QKV):
    """The biases of queries and values, with zeros for the keys between them.

    A key's bias adds the same to all scores of a query, which softmax does not see: one that training has moved by
    rounding changes nothing, and is not written.
    """

    def to_ours(self, tensors: list[Tensor], geometry: Geometry) -> Tensor:
        query, value = tensors
        return super().to_ours([query, torch.zeros_like(query), value], geometry)

    def to_theirs(self, tensor: Tensor, geometry: Geometry) -> list[Tensor]:
        query, _, value = super().to_theirs(tensor, geometry)
        return [query, value]


_ATTENTION = _LAYER + "self_attention."


HF_RULES = RuleSet(
    (
        *pair("conv1", "embeddings.patch_embedding"),
        Reshape("class_token", ("embeddings.class_embedding",), ours=(1, 1, -1), theirs=(1, 1, -1)),
        Positions("position_embeddings.weight", ("embeddings.position_embedding",)),
        *pair(_LAYER + "input_layernorm", "encoder.layers.{}.layer_norm1"),
        PackedQKV(_ATTENTION + "linear_qkv.weight", ("encoder.layers.{}.self_attn.qkv.weight",), axis=0),
        PackedQKV(_ATTENTION + "linear_qkv.bias", ("encoder.layers.{}.self_attn.qkv.bias",), axis=0),
        *pair(_ATTENTION + "linear_proj", "encoder.layers.{}.self_attn.projection", 1),
        *pair(_LAYER + "pre_mlp_layernorm", "encoder.layers.{}.layer_norm2"),
        *pair(_LAYER + "mlp.linear_fc1", "encoder.layers.{}.mlp.fc1", 0),
        *pair(_LAYER + "mlp.linear_fc2", "encoder.layers.{}.mlp.fc2", 1),
    )
)

EVA_RULES = RuleSet(
    (
        *pair("conv1", "patch_embed.proj"),
        Reshape("class_token", ("cls_token",), ours=(1, 1, -1), theirs=(1, 1, -1)),
        Positions("position_embeddings.weight", ("pos_embed",)),
        *pair(_LAYER + "input_layernorm", "blocks.{}.norm1"),
        PackedQKV(_ATTENTION + "linear_qkv.weight", ("blocks.{}.attn.qkv.weight",), axis=0),
        BiasWithoutKeys(_ATTENTION + "linear_qkv.bias", ("blocks.{}.attn.q_bias", "blocks.{}.attn.v_bias"), axis=0),
        *pair(_ATTENTION + "linear_proj", "blocks.{}.attn.proj", 1),
        *pair(_LAYER + "pre_mlp_layernorm", "blocks.{}.norm2"),
        *pair(_LAYER + "mlp.linear_fc1", "blocks.{}.mlp.fc1", 0),
        *pair(_LAYER + "mlp.linear_fc2", "blocks.{}.mlp.fc2", 1),
        # The layer behind the last one that is built.
        *(Drop(f"blocks.{{}}.{name}.*") for name in ("attn", "mlp", "norm1", "norm2")),
    )
)
"""Names of LAVIS and MiniGPT-4."""

EVA_FILE = Layout(
    "eva",
    (r"^blocks\.0\.attn\.q_bias$", r"^pos_embed$", r"^patch_embed\.proj\.weight$"),
    (
        *(Prefix(name, VISION, name) for name in ("blocks.", "cls_token", "pos_embed", "patch_embed.")),
        *(Prefix(name, None) for name in ("norm.", "fc_norm.", "head.", "mask_token", "lm_head.")),
    ),
    {VISION: "eva"},
)
"""The public eva_vit_g.pth. Its norm and head stand behind the layers that the models have."""


def image_processor(spec: EvaSpec) -> dict[str, Any]:
    """preprocessor_config.json of the releases, at the encoder's size: images are stretched to squares."""
    steps = dict.fromkeys(("do_convert_rgb", "do_normalize", "do_rescale", "do_resize"), True)
    return {
        "image_processor_type": "BlipImageProcessor",
        **steps,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": spec.image_size, "width": spec.image_size},
    }


def shapes(spec: EvaSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of our tensors; `{}` is the layer."""
    width, inner = spec.hidden_size, spec.ffn_hidden_size
    linears = {
        _ATTENTION + "linear_qkv": (3 * width, width),
        _ATTENTION + "linear_proj": (width, width),
        _LAYER + "mlp.linear_fc1": (inner, width),
        _LAYER + "mlp.linear_fc2": (width, inner),
    }
    result = {
        "conv1.weight": (width, spec.num_channels, spec.patch_size, spec.patch_size),
        "conv1.bias": (width,),
        "class_token": (1, 1, width),
        "position_embeddings.weight": (spec.num_positions, width),
    }
    norms = (_LAYER + "input_layernorm", _LAYER + "pre_mlp_layernorm")
    return result | linear_shapes(linears) | norm_shapes(norms, width)


def build(spec: EvaSpec, runtime):
    """The vision encoder."""
    from mindspeed_mm.models.kit.eva import EvaVisionEncoder

    return EvaVisionEncoder(spec, runtime)


PART = Part(
    name="eva_vit",
    kind="vision_encoder",
    Spec=EvaSpec,
    model_types=MODEL_TYPES,
    keys=CONFIG_KEYS,
    layouts=(EVA_FILE,),
    image_processor=image_processor,
    from_hf=from_hf,
    to_hf=to_hf,
    from_shapes=from_shapes,
    rules={"hf": HF_RULES, "eva": EVA_RULES, "ours": HF_RULES.own()},
    shapes=shapes,
    build=build,
    # Not the image's size: positions are interpolated.
    checked=tuple(key for key in KEYS if key not in ("image_size", "attention_dropout")),
)
