"""Qwen2.5-VL's vision encoder (Bai et al. 2025): spec, HF config and weight rules.

Images keep their shape: the encoder takes patches, and their number follows from the size of an image. Attention stays
inside windows but for a few layers. Letters: H width, F MLP size, D channels of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import pydantic
from torch import Tensor

from mindspeed_mm.config.file_keys import COMMON, NO_CONFIG, OLD_OPTIONS, file_keys
from mindspeed_mm.config.load import load_config
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.kit.encoder_spec import EncoderSpec
from mindspeed_mm.models.operations import EncoderWork, Grid, LayerShape
from mindspeed_mm.models.part import Part, Size, only
from mindspeed_mm.weights.rules import GateUp, Geometry, PackedQKV, Reshape, Rule, RuleSet

HF_DEFAULTS = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": (7, 15, 23, 31),
    "hidden_act": "silu",
    "tokens_per_second": 4,
}
"""Values of keys that a config.json may omit: transformers' Qwen2_5_VLVisionConfig."""

ROPE_THETA = 10000.0

KEYS = file_keys(
    "Qwen2.5-VL vision encoder config",
    (*HF_DEFAULTS, "dtype", "torch_dtype", "rope_parameters", "out_hidden_size"),
    {**NO_CONFIG, "attention_dropout": (0,), "in_chans": (3,), "rope_theta": (ROPE_THETA,), "rope_scaling": ()},
    (*COMMON, *OLD_OPTIONS, "spatial_patch_size", "image_token_id", "video_token_id", "vision_start_token_id")
    + ("vision_end_token_id",),
)
"""Of the vision_config; out_hidden_size is the projector's. The hub's files repeat in_channels and patch_size under
older names; rotation is told by rope_parameters alone."""

MODEL_TYPES = ("qwen2_5_vl_vision",)
OLD_MODEL_TYPE = "qwen2_5_vl"
"""What vision_config of the hub's folders says."""

NOMINAL_SIDE = 448
"""Pixels of a side of the image that plans are made with, where no data is at hand."""


@dataclass(frozen=True)
class PatchGeometry(Geometry):
    """A Geometry that knows the shape of a patch."""

    patch: tuple[int, int, int, int] = (3, 2, 14, 14)
    """Channels, frames, height and width."""


class PatchVisionSpec(EncoderSpec):
    """image_encoder.vision_encoder block of a model.json."""

    architecture = "Qwen2.5-VL"
    independent_rows = False

    model_id: Literal["qwen2_5_vl"] = "qwen2_5_vl"
    patch_size: Size = 14
    temporal_patch_size: Size = 2
    """Frames in a patch; an image is repeated so often."""
    spatial_merge_size: Size = 2
    """Patches along a side of the square that the projector makes one feature of."""
    window_size: Size = 112
    """Pixels along a side of the windows that attention stays in."""
    full_attention_layers: Annotated[tuple[int, ...], pydantic.Strict(False)] = (7, 15, 23, 31)
    """Layers, from 0, whose attention sees the whole image (a frame of a video)."""
    rope_theta: Annotated[float, pydantic.Field(gt=0)] = ROPE_THETA
    tokens_per_second: Size = 4
    """Positions in time for a second of a video."""
    num_channels: Annotated[int, only(3, why="images are RGB")] = 3
    activation_func: Annotated[str, only("silu", why="Qwen2.5-VL has SwiGLU")] = "silu"
    gated_linear_unit: Annotated[bool, only(True, why="Qwen2.5-VL has SwiGLU")] = True
    add_bias_linear: Annotated[bool, only(True, why="Qwen2.5-VL's linears have biases")] = True
    add_qkv_bias: Annotated[bool, only(True, why="Qwen2.5-VL's linears have biases")] = True
    normalization: Annotated[str, only("RMSNorm", why="Qwen2.5-VL has RMSNorm")] = "RMSNorm"
    layernorm_epsilon: Annotated[float, only(1e-6, why="transformers has this number in its code")] = 1e-6

    @pydantic.model_validator(mode="before")
    @classmethod
    def _derive(cls, data: Any) -> Any:
        return cls.derived(data)

    @pydantic.model_validator(mode="after")
    def _sizes_fit(self) -> "PatchVisionSpec":
        self.check_heads()
        if self.kv_channels % 4:
            raise ValueError(
                f"kv_channels {self.kv_channels} is no multiple of 4, which rotary positions of rows and columns need"
            )
        if self.window_size < self.patch_size * self.spatial_merge_size:
            raise ValueError(
                f"window_size {self.window_size} holds no square of {self.spatial_merge_size} x "
                f"{self.spatial_merge_size} patches of {self.patch_size} pixels"
            )
        wrong = [layer for layer in self.full_attention_layers if not 0 <= layer < self.num_layers]
        if wrong:
            raise ValueError(
                f"full_attention_layers {wrong} (HF's fullatt_block_indexes) are outside the {self.num_layers} layers, "
                "counted from 0"
            )
        self.check_stages()
        return self

    @property
    def patch_channels(self) -> int:
        """Values of a patch."""
        return self.num_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_units(self) -> int:
        """Merged squares along a side of a window."""
        return self.window_size // self.spatial_merge_size // self.patch_size

    @property
    def planned_grid(self) -> tuple[int, int, int]:
        """Frames, and patches down and across, of the image that plans are made with: a square of NOMINAL_SIDE."""
        side = max(1, NOMINAL_SIDE // self.patch_size // self.spatial_merge_size) * self.spatial_merge_size
        return 1, side, side

    def encoder_work(self, rows: float, grids: Sequence[Grid]) -> EncoderWork:
        """See PartSpec; the work follows from the grids, in patches, alone."""
        whole = sum(time * (height * width) ** 2 for time, height, width in grids)
        inside = sum(time * self._window_pairs(height) * self._window_pairs(width) for time, height, width in grids)
        full = len(set(self.full_attention_layers))
        patches = sum(time * height * width for time, height, width in grids)
        return EncoderWork(
            rows=patches,
            pixels=patches * self.patch_channels,
            positions=patches,
            patches=patches,
            features=patches / self.spatial_merge_size**2,
            pairs=full * whole + (self.num_layers - full) * inside,
            items=len(grids),
        )

    @property
    def layer(self) -> LayerShape:
        return replace(super().layer, segments=True)

    def _window_pairs(self, patches: int) -> int:
        """Pairs along one axis that share a window."""
        windows, rest = divmod(patches, self.window_units * self.spatial_merge_size)
        return windows * (self.window_units * self.spatial_merge_size) ** 2 + rest**2

    @property
    def geometry(self) -> PatchGeometry:
        return PatchGeometry(
            num_layers=self.num_layers,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            kv_channels=self.kv_channels,
            patch=(self.num_channels, self.temporal_patch_size, self.patch_size, self.patch_size),
        )


_KEYS = {
    "num_layers": "depth",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_heads",
    "num_channels": "in_channels",
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "spatial_merge_size": "spatial_merge_size",
    "window_size": "window_size",
    "full_attention_layers": "fullatt_block_indexes",
    "activation_func": "hidden_act",
    "tokens_per_second": "tokens_per_second",
}
"""Our keys and HF's."""


def from_hf(config: dict[str, Any]) -> PatchVisionSpec:
    """PatchVisionSpec of the vision_config of a Qwen2_5_VLConfig. Raises ConfigError for another architecture."""
    kind = config.get("model_type", MODEL_TYPES[0])
    if kind not in (*MODEL_TYPES, OLD_MODEL_TYPE):
        raise ConfigError(f'vision encoder config: found model_type "{kind}"; expected {MODEL_TYPES[0]}.')
    KEYS.check(config)
    full = {**HF_DEFAULTS, **config}
    rope = full.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") != "axial":
        raise ConfigError(f"vision encoder config: found rope_type {rope['rope_type']!r}; expected axial.")
    block = {ours: full[theirs] for ours, theirs in _KEYS.items()}
    rest = {
        "rope_theta": float(rope.get("rope_theta", ROPE_THETA)),
        "params_dtype": full.get("dtype") or full.get("torch_dtype"),
    }
    return load_config(PatchVisionSpec, block | rest, what="vision encoder config", names=_KEYS)


def to_hf(spec: PatchVisionSpec, dtype: str) -> dict[str, Any]:
    """The vision_config of a Qwen2_5_VLConfig; `dtype` as HF names it."""
    written = {theirs: getattr(spec, ours) for ours, theirs in _KEYS.items()}
    rope = {"rope_parameters": {"rope_type": "axial", "rope_theta": spec.rope_theta}}
    # The name that transformers of every version reads.
    return {
        "model_type": OLD_MODEL_TYPE,
        **written,
        "fullatt_block_indexes": list(spec.full_attention_layers),
        **({} if spec.rope_theta == ROPE_THETA else rope),
        "torch_dtype": dtype,
    }


@dataclass(frozen=True)
class Flatten(Reshape):
    """The convolution over one patch as the matrix that it is: [H, channels, frames, h, w] -> [H, their product]."""

    def to_ours(self, tensors: list[Tensor], geometry: PatchGeometry) -> Tensor:
        return tensors[0].flatten(1)

    def to_theirs(self, tensor: Tensor, geometry: PatchGeometry) -> list[Tensor]:
        return [tensor.reshape(-1, *geometry.patch)]


_LAYER = "decoder.layers.{}."
_ATTENTION = _LAYER + "self_attention."


def _linears() -> tuple[Rule, ...]:
    rules: list[Rule] = []
    for kind, row_axis in (("weight", 1), ("bias", None)):
        rules += [
            PackedQKV(f"{_ATTENTION}linear_qkv.{kind}", (f"blocks.{{}}.attn.qkv.{kind}",), axis=0),
            Rule(f"{_ATTENTION}linear_proj.{kind}", (f"blocks.{{}}.attn.proj.{kind}",), row_axis),
            GateUp(
                f"{_LAYER}mlp.linear_fc1.{kind}",
                (f"blocks.{{}}.mlp.gate_proj.{kind}", f"blocks.{{}}.mlp.up_proj.{kind}"),
                axis=0,
            ),
            Rule(f"{_LAYER}mlp.linear_fc2.{kind}", (f"blocks.{{}}.mlp.down_proj.{kind}",), row_axis),
        ]
    return tuple(rules)


HF_RULES = RuleSet(
    (
        Flatten("patch_embedding.weight", ("patch_embed.proj.weight",)),
        Rule(_LAYER + "input_layernorm.weight", ("blocks.{}.norm1.weight",)),
        Rule(_LAYER + "pre_mlp_layernorm.weight", ("blocks.{}.norm2.weight",)),
        *_linears(),
    )
)


def shapes(spec: PatchVisionSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of our tensors; `{}` is the layer."""
    width, inner = spec.hidden_size, spec.ffn_hidden_size
    linears = {
        _ATTENTION + "linear_qkv": (3 * width, width),
        _ATTENTION + "linear_proj": (width, width),
        _LAYER + "mlp.linear_fc1": (2 * inner, width),
        _LAYER + "mlp.linear_fc2": (width, inner),
    }
    result = {"patch_embedding.weight": (width, spec.patch_channels)}
    for name, shape in linears.items():
        result |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return result | {f"{_LAYER}{name}.weight": (width,) for name in ("input_layernorm", "pre_mlp_layernorm")}


def build(spec: PatchVisionSpec, runtime):
    """The vision encoder."""
    from mindspeed_mm.models.kit.patch_vision import PatchVisionEncoder

    return PatchVisionEncoder(spec, runtime)


PART = Part(
    name="qwen2_5_vl",
    kind="vision_encoder",
    Spec=PatchVisionSpec,
    keys=KEYS,
    model_types=(*MODEL_TYPES, OLD_MODEL_TYPE),
    from_hf=from_hf,
    to_hf=to_hf,
    rules={"hf": HF_RULES, "ours": HF_RULES.own()},
    shapes=shapes,
    build=build,
    checked=tuple(key for key in _KEYS if key not in ("num_channels", "tokens_per_second")),
)
