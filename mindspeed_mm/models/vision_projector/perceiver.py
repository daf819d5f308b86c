"""Flamingo's perceiver resampler (Alayrac et al. 2022): learned latents that attend to the features of an image, or of
all frames of a video. Spec, weight rules.

Letters: W width of the encoder, which the latents have too, F the MLP's, N heads, D channels of a head, L latents.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic

from mindspeed_mm.config.load import load_config
from mindspeed_mm.models.operations import EncoderWork, Product
from mindspeed_mm.models.part import Part, PartSpec, Size, only
from mindspeed_mm.weights.rules import Geometry, Halves, Rule, RuleSet

EXPANSION = 4
"""Width of the MLP over that of the latents; in all releases."""


@dataclass(frozen=True)
class PerceiverGeometry(Geometry):
    """A Geometry that says whether frames have embeddings."""

    frames: bool = False


class PerceiverSpec(PartSpec):
    """image_encoder.vision_projector block of a model.json."""

    independent_rows = False

    model_id: Literal["perceiver"] = "perceiver"
    input_size: Size
    """Width of the vision encoder."""
    hidden_size: Size
    """Width of the latents, the encoder's."""
    num_layers: Size = 6
    num_attention_heads: Size = 8
    kv_channels: Size = 64
    ffn_hidden_size: Size = None  # 4 * hidden_size
    num_latents: Size = 64
    """Features of an item behind the projector."""
    max_frames: Size | None = None
    """Most frames of a video, where each has an embedding; null: frames have none."""
    layernorm_epsilon: Annotated[float, pydantic.Field(gt=0)] = 1e-5
    activation_func: Annotated[str, only("gelu", why="the perceiver has GELU (erf)")] = "gelu"
    gated_linear_unit: Annotated[bool, only(False, why="the perceiver's MLP has no gate")] = False
    add_bias_linear: Annotated[bool, only(False, why="the perceiver's linears have no biases")] = False
    add_qkv_bias: Annotated[bool, only(False, why="the perceiver's linears have no biases")] = False
    normalization: Annotated[str, only("LayerNorm", why="the perceiver has LayerNorm")] = "LayerNorm"

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("ffn_hidden_size") is None and isinstance(data.get("hidden_size"), int):
            data = {**data, "ffn_hidden_size": EXPANSION * data["hidden_size"]}
        return data

    @pydantic.model_validator(mode="after")
    def _latents_are_as_wide_as_features(self) -> "PerceiverSpec":
        if self.input_size != self.hidden_size:
            raise ValueError(
                f"hidden_size is {self.hidden_size}; expected {self.input_size}, the input_size: the latents are as "
                "wide as the features"
            )
        return self

    @property
    def num_query_groups(self) -> int:
        """Plain multi-head attention."""
        return self.num_attention_heads

    def products(self, work: EncoderWork) -> tuple[Product, ...]:
        """Keys and values of the features, then all that runs on latents, products of one shape together, attention's
        own among them. Norms, which are short, are left out."""
        width, layers, latents = self.hidden_size, self.num_layers, work.items * self.num_latents
        heads = self.num_attention_heads * self.kv_channels
        places = round(work.features / work.items) + self.num_latents if work.items else 0
        inner, memory = layers * latents * self.ffn_hidden_size, work.features + latents
        return (
            Product(memory, width, 2 * layers * heads, kept=2 * layers * memory * width, behind_weights=True),
            Product(latents, width, layers * heads, kept=2 * layers * latents * width),
            Product(latents, places, 2 * layers * heads, kept=layers * (latents + 2 * memory) * heads, keys=places),
            Product(latents, heads, layers * width, kept=layers * latents * heads, split=True),
            Product(latents, width, layers * self.ffn_hidden_size, kept=2 * layers * latents * width),
            Product(latents, self.ffn_hidden_size, layers * width, kept=inner, activated=inner, split=True),
        )

    @property
    def geometry(self) -> PerceiverGeometry:
        return PerceiverGeometry(
            num_layers=self.num_layers,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_attention_heads,
            kv_channels=self.kv_channels,
            frames=self.max_frames is not None,
        )


def from_hf(config: dict[str, Any]) -> PerceiverSpec:
    """PerceiverSpec of the config.json of a whole model, whose sizes but these are in no config."""
    width = (config.get("vision_config") or {}).get("hidden_size", 1024)
    block = {"input_size": width, "hidden_size": width, "max_frames": config.get("max_num_frames")}
    return load_config(PerceiverSpec, block, what="projector config")


_LAYER = "encoder.layers.{}."
_ATTENTION, _MLP = _LAYER + "attention.", _LAYER + "mlp."


def _norm(ours: str, theirs: str) -> tuple[Rule, ...]:
    return tuple(Rule(f"{ours}.{kind}", (f"{theirs}.{kind}",)) for kind in ("weight", "bias"))


def _rules(attention: str, mlp: str) -> RuleSet:
    """The rules of one public form, by what stands before the names of a layer's attention and of its MLP."""
    return RuleSet(
        (
            Rule("latents", ("latents",)),
            Rule("frame_embeddings", ("frame_embs",), needs="frames"),
            *_norm(_ATTENTION + "media_norm", attention + "norm_media"),
            *_norm(_ATTENTION + "latent_norm", attention + "norm_latents"),
            Rule(_ATTENTION + "linear_q.weight", (attention + "to_q.weight",), axis=0),
            Halves(_ATTENTION + "linear_kv.weight", (attention + "to_kv.weight",), axis=0),
            Rule(_ATTENTION + "linear_proj.weight", (attention + "to_out.weight",), axis=1),
            *_norm(_MLP + "norm", mlp + "0"),
            Rule(_MLP + "linear_fc1.weight", (mlp + "1.weight",), axis=0),
            Rule(_MLP + "linear_fc2.weight", (mlp + "3.weight",), axis=1),
            *_norm("final_norm", "norm"),
        )
    )


FLAMINGO_RULES = _rules("layers.{}.0.", "layers.{}.1.")
"""OpenFlamingo."""
OTTER_RULES = _rules("layers.{}.", "layers.{}.feed_forward.")
"""Otter."""


def shapes(spec: PerceiverSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of our tensors; `{}` is the layer."""
    width, heads = spec.hidden_size, spec.num_attention_heads * spec.kv_channels
    result = {
        "latents": (spec.num_latents, width),
        "frame_embeddings": (spec.max_frames or 0, width),
        _ATTENTION + "linear_q.weight": (heads, width),
        _ATTENTION + "linear_kv.weight": (2 * heads, width),
        _ATTENTION + "linear_proj.weight": (width, heads),
        _MLP + "linear_fc1.weight": (spec.ffn_hidden_size, width),
        _MLP + "linear_fc2.weight": (width, spec.ffn_hidden_size),
    }
    for norm in (_ATTENTION + "media_norm", _ATTENTION + "latent_norm", _MLP + "norm", "final_norm"):
        result |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    return result


def build(spec: PerceiverSpec, runtime):
    """The projector."""
    from mindspeed_mm.models.kit.perceiver import PerceiverResampler

    return PerceiverResampler(spec, runtime)


PART = Part(
    name="perceiver",
    kind="vision_projector",
    Spec=PerceiverSpec,
    from_hf=from_hf,
    rules={"hf": OTTER_RULES, "flamingo": FLAMINGO_RULES, "ours": OTTER_RULES.own()},
    shapes=shapes,
    build=build,
    checked=("input_size", "hidden_size", "max_frames"),
)
