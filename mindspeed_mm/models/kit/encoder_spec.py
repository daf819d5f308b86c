"""What specs of vision encoders share: multi-head attention that fills the width, a place on the first stage; and what
those of vision transformers on images of one size share beside, with the rules and shapes of their layers."""

from dataclasses import replace
from typing import Annotated, Any, ClassVar

import pydantic

from mindspeed_mm.models.operations import LayerShape
from mindspeed_mm.models.part import PartSpec, Size, StageLayers, flat_layers, only
from mindspeed_mm.weights.rules import QKV, Rule

LAYER = "decoder.layers.{}."
"""What stands before the names of a layer's tensors."""

_DERIVED = ("num_query_groups", "kv_channels")


def _plain(value: Any) -> Any:
    """A list of one layer as that layer, as HF's configs mean it; another sequence as a list."""
    if isinstance(value, list | tuple):
        return value[0] if len(value) == 1 else list(value)
    return value


SelectLayer = Annotated[int | Annotated[list[int], pydantic.Field(min_length=2)], pydantic.BeforeValidator(_plain)]


class EncoderSpec(PartSpec):
    """Keys of an image_encoder.vision_encoder block of a model.json."""

    architecture: ClassVar[str]
    """The name that messages say."""

    num_layers: Size
    hidden_size: Size
    ffn_hidden_size: Size
    num_attention_heads: Size
    num_query_groups: Size = None  # heads
    kv_channels: Size = None  # hidden_size / heads
    pipeline_num_layers: StageLayers | None = None
    """Layers of each pipeline stage; the vision encoder stands on the first stage."""

    @staticmethod
    def derived(data: Any) -> Any:
        """A block with what is not given, or null, derived; for a subclass's validator in mode "before"."""
        if not isinstance(data, dict):
            return data
        data = {key: value for key, value in data.items() if value is not None or key not in _DERIVED}
        hidden, heads = data.get("hidden_size"), data.get("num_attention_heads")
        if isinstance(hidden, int) and isinstance(heads, int) and hidden > 0 and heads > 0:
            data.setdefault("num_query_groups", heads)
            if hidden % heads == 0:
                data.setdefault("kv_channels", hidden // heads)
        return data

    def check_heads(self) -> None:
        """Raise ValueError for heads that do not fill the width."""
        heads = self.num_attention_heads
        if self.kv_channels is None or self.kv_channels * heads != self.hidden_size or self.num_query_groups != heads:
            raise ValueError(
                f"num_attention_heads {heads} x kv_channels {self.kv_channels} in num_query_groups "
                f"{self.num_query_groups} is not hidden_size {self.hidden_size}; {self.architecture} has plain "
                "multi-head attention whose heads fill its width"
            )

    def check_stages(self) -> None:
        """Raise ValueError for layers on another pipeline stage than the first."""
        stages = flat_layers(self.pipeline_num_layers or [])
        whole = (self.num_layers, self.num_built_layers)
        if self.pipeline_num_layers is not None and (stages[0] not in whole or any(stages[1:])):
            raise ValueError(
                f"pipeline_num_layers {self.pipeline_num_layers} spreads the vision encoder, which stands on the first "
                "pipeline stage as a whole: between its layers, features of images would travel where hidden states of "
                f"the text do; expected {[self.num_layers] + [0] * (len(stages) - 1)}, and fewer text_decoder layers "
                "there"
            )

    @property
    def num_built_layers(self) -> int:
        """Layers that the features need: all."""
        return self.num_layers

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Layers, counted from 1, whose hidden states stand side by side in each feature; 0 is what the first takes."""
        return (self.num_layers,)

    @property
    def carried_size(self) -> int:
        """Values of each position that full recomputation keeps beside the inputs of layers."""
        return 0


class FixedSizeSpec(EncoderSpec):
    """A vision transformer on images of one size, whose feature is the hidden state behind one of its layers."""

    num_layers: Size
    """Layers of the source, also those behind the feature that are not built."""
    patch_size: Size
    image_size: Size
    """Pixels behind the last whole patch are not looked at (384 = 27 x 14 + 6)."""
    num_channels: Annotated[int, only(3, why="images are RGB")] = 3
    class_token_len: int
    select_layer: SelectLayer
    """Hidden state that is the feature, counted as HF does: 1 = after the first layer, -1 = after the last. Of a list,
    the hidden states stand side by side in each feature, in this order; in a list, 0 is what the first layer takes."""

    def check_image(self) -> None:
        """Raise ValueError for an image without a patch, and for a feature behind a layer that does not exist."""
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size {self.image_size} holds no patch of patch_size {self.patch_size}")
        single = not isinstance(self.select_layer, list)
        lowest = 1 if single else 0
        if min(self.feature_layers) < lowest or not 0 < self.num_built_layers <= self.num_layers:
            expected = f"{-self.num_layers}..-1 or 1..{self.num_layers}"
            expected = expected if single else f"{-self.num_layers - 1}..{self.num_layers}, one of them behind a layer"
            raise ValueError(
                f"select_layer {self.select_layer} (HF's vision_feature_layer) is outside the {self.num_layers} "
                f"layers; expected {expected}"
            )

    @property
    def layer(self) -> LayerShape:
        return replace(super().layer, rotary=False)

    @property
    def feature_layers(self) -> tuple[int, ...]:
        chosen = self.select_layer if isinstance(self.select_layer, list) else [self.select_layer]
        return tuple(layer if layer >= 0 else self.num_layers + 1 + layer for layer in chosen)

    @property
    def feature_size(self) -> int:
        return self.hidden_size * len(self.feature_layers)

    @property
    def num_built_layers(self) -> int:
        """Layers that the feature needs."""
        return max(self.feature_layers)

    @property
    def carried_size(self) -> int:
        return self.hidden_size * sum(range(2, len(set(self.feature_layers))))

    @property
    def num_positions(self) -> int:
        """Rows of the position embedding: class token and patches."""
        return (self.image_size // self.patch_size) ** 2 + self.class_token_len


def pair(ours: str, theirs: str, axis: int | None = None, **options: Any) -> tuple[Rule, Rule]:
    """Weight and bias of one linear or norm; a row-parallel linear (axis 1) has a replicated bias."""
    return (
        Rule(f"{ours}.weight", (f"{theirs}.weight",), axis, **options),
        Rule(f"{ours}.bias", (f"{theirs}.bias",), 0 if axis == 0 else None, **options),
    )


def hf_layer_rules() -> tuple[Rule, ...]:
    """A layer as transformers names it in CLIP and SigLIP."""
    sources = "encoder.layers.{}."
    qkv = (
        QKV(
            f"{LAYER}self_attention.linear_qkv.{kind}",
            tuple(f"{sources}self_attn.{name}_proj.{kind}" for name in "qkv"),
            axis=0,
        )
        for kind in ("weight", "bias")
    )
    return (
        *pair(LAYER + "input_layernorm", sources + "layer_norm1"),
        *qkv,
        *pair(LAYER + "self_attention.linear_proj", sources + "self_attn.out_proj", 1),
        *pair(LAYER + "pre_mlp_layernorm", sources + "layer_norm2"),
        *pair(LAYER + "mlp.linear_fc1", sources + "mlp.fc1", 0),
        *pair(LAYER + "mlp.linear_fc2", sources + "mlp.fc2", 1),
    )


def linear_shapes(linears: dict[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """Weights [outputs, inputs] and biases of linears by name."""
    result: dict[str, tuple[int, ...]] = {}
    for name, shape in linears.items():
        result |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return result


def norm_shapes(names: tuple[str, ...], width: int) -> dict[str, tuple[int, ...]]:
    """Weights and biases of norms."""
    return {f"{name}.{kind}": (width,) for name in names for kind in ("weight", "bias")}


def fixed_size_shapes(spec: FixedSizeSpec) -> dict[str, tuple[int, ...]]:
    """Patch and position embedding, the layers, and the norm behind them, which no feature passes."""
    width, inner = spec.hidden_size, spec.ffn_hidden_size
    return {
        "conv1.weight": (width, spec.num_channels, spec.patch_size, spec.patch_size),
        "position_embeddings.weight": (spec.num_positions, width),
        **linear_shapes(
            {
                LAYER + "self_attention.linear_qkv": (3 * width, width),
                LAYER + "self_attention.linear_proj": (width, width),
                LAYER + "mlp.linear_fc1": (inner, width),
                LAYER + "mlp.linear_fc2": (width, inner),
            }
        ),
        **norm_shapes(("post_layernorm", LAYER + "input_layernorm", LAYER + "pre_mlp_layernorm"), width),
    }


CHECKED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "ffn_hidden_size",
    "patch_size",
    "image_size",
    "activation_func",
    "layernorm_epsilon",
)
"""Fields that a source's config must confirm, of encoders with images of one size."""
