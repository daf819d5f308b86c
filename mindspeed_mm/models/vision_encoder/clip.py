"""CLIP vision transformer: spec, HF config and weight rules.

The feature is a hidden state before the last layer, so the layers behind it and the final norm are never built.
Letters: H width, F MLP size, N heads, D channels per head, P patches per image.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import pydantic

from mindspeed_mm.config.file_keys import COMMON, NO_CONFIG, OLD_OPTIONS, file_keys
from mindspeed_mm.config.load import load_config
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.kit.encoder_spec import (
    CHECKED,
    LAYER,
    FixedSizeSpec,
    SelectLayer,
    fixed_size_shapes,
    hf_layer_rules,
    norm_shapes,
    pair,
)
from mindspeed_mm.models.part import Part, Size, only
from mindspeed_mm.weights.layouts import VISION, Layout, Prefix
from mindspeed_mm.weights.rules import Drop, Geometry, PackedQKV, Reshape, Rule, RuleSet

HF_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
"""Values of keys that a config.json may omit: the documented defaults of transformers' CLIPVisionConfig, and of
LlavaConfig for the two vision_feature keys."""

MODEL_TYPES = ("clip_vision_model", "clip")

KEYS = file_keys(
    "CLIP vision encoder config",
    (*HF_DEFAULTS, "dtype", "torch_dtype", "vision_config", "vision_config_dict"),
    {**NO_CONFIG, "attention_dropout": (0,), "dropout": (0,)},
    (*COMMON, *OLD_OPTIONS, "text_config", "text_config_dict", "projection_dim", "logit_scale_init_value"),
)
"""Of a CLIPVisionConfig, and of a CLIPConfig with its vision_config; the text model is not used."""

HEAD_CHANNELS = 64
"""Channels per head of every released CLIP vision encoder (OpenAI's loader: heads = width / 64)."""

TRIMMEDLAYERS = 23
"""Layers of CLIP-L when the one that LLaVA does not use is left out (MindSpeed-MM from 2.1 on)."""

SELECT_FEATURES = {"default": "patch", "full": "cls_patch"}
"""HF's vision_feature_select_strategy in LLaVA's words (mm_vision_select_feature)."""


class ClipSpec(FixedSizeSpec):
    """image_encoder.vision_encoder block of a model.json."""

    architecture = "CLIP"
    outer_norms = 1

    model_id: Literal["clip"] = "clip"
    ffn_hidden_size: Size = None  # 4 * hidden_size
    num_attention_heads: Size = None  # hidden_size / 64
    add_class_token: Annotated[bool, only(True, why="CLIP has a class token")] = True
    class_token_len: Annotated[int, only(1, why="CLIP has one class token")] = 1
    select_layer: SelectLayer = -2
    select_feature: Literal["patch", "cls_patch"] = "patch"
    activation_func: Literal["quick_gelu", "gelu"] = "quick_gelu"
    gated_linear_unit: Annotated[bool, only(False, why="CLIP's MLP has no gate")] = False
    add_bias_linear: Annotated[bool, only(True, why="CLIP's linears have biases")] = True
    add_qkv_bias: Annotated[bool, only(True, why="CLIP's linears have biases")] = True
    normalization: Annotated[str, only("LayerNorm", why="CLIP has LayerNorm")] = "LayerNorm"
    layernorm_epsilon: Annotated[float, pydantic.Field(gt=0)] = 1e-5
    post_layer_norm: Annotated[bool, only(False, why="the feature is taken before the final norm")] = False
    device: str | None = None
    """Device of the ancestor's helper tensors; ours live on the run's device."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """Derive what is not given or null."""
        if not isinstance(data, dict):
            return data
        if data.get("num_layers") == TRIMMEDLAYERS and "select_layer" not in data:
            raise ValueError(
                "num_layers 23 can mean CLIP-L without its unused last layer, as the ancestor's later converters write "
                'it, or a vision encoder of 23 layers; say which: "select_layer": -1 for the first, -2 for the second'
            )
        data = {key: value for key, value in data.items() if value is not None or key not in _DERIVED}
        hidden = data.get("hidden_size")
        if isinstance(hidden, int) and hidden > 0:
            data.setdefault("ffn_hidden_size", 4 * hidden)
            if hidden % HEAD_CHANNELS == 0:
                data.setdefault("num_attention_heads", hidden // HEAD_CHANNELS)
        return cls.derived(data)

    @pydantic.model_validator(mode="after")
    def _shapes_fit(self) -> "ClipSpec":
        if self.num_attention_heads is None:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of {HEAD_CHANNELS}; give num_attention_heads"
            )
        self.check_heads()
        self.check_image()
        self.check_stages()
        return self

    @property
    def num_image_tokens(self) -> int:
        """Vectors that one image gives to the projector."""
        return self.num_positions - (self.class_token_len if self.select_feature == "patch" else 0)

    @property
    def geometry(self) -> Geometry:
        return Geometry(
            num_layers=self.num_built_layers,
            source_layers=self.num_layers,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            kv_channels=self.kv_channels,
        )


_DERIVED = ("ffn_hidden_size", "num_attention_heads")


def from_hf(config: dict[str, Any]) -> ClipSpec:
    """ClipSpec of an HF CLIPVisionConfig or CLIPConfig, optionally with LLaVA's two vision_feature keys beside.

    Raises ConfigError for another architecture.
    """
    kind = config.get("model_type", "clip_vision_model")
    if kind not in MODEL_TYPES:
        raise ConfigError(f'vision encoder config: found model_type "{kind}"; expected {" or ".join(MODEL_TYPES)}.')
    inner = (config.get("vision_config") or {}) | (
        config.get("vision_config_dict") or {}
    )  # the latter is the older key
    KEYS.check({**config, **inner})
    full = {**HF_DEFAULTS, **config, **inner}
    strategy = full["vision_feature_select_strategy"]
    if strategy not in SELECT_FEATURES:
        raise ConfigError(
            f"vision encoder config: found vision_feature_select_strategy {strategy!r}; expected default or full."
        )
    return load_config(
        ClipSpec,
        {
            "num_layers": full["num_hidden_layers"],
            "hidden_size": full["hidden_size"],
            "ffn_hidden_size": full["intermediate_size"],
            "num_attention_heads": full["num_attention_heads"],
            "patch_size": full["patch_size"],
            "image_size": full["image_size"],
            "num_channels": full["num_channels"],
            "activation_func": full["hidden_act"],
            "layernorm_epsilon": full["layer_norm_eps"],
            "init_method_std": full["initializer_range"],
            "select_layer": full["vision_feature_layer"],
            "select_feature": SELECT_FEATURES[strategy],
            "params_dtype": full.get("dtype") or full.get("torch_dtype"),
        },
        what="vision encoder config",
        names={"activation_func": "hidden_act", "layernorm_epsilon": "layer_norm_eps"},
    )


def to_hf(spec: ClipSpec, dtype: str) -> dict[str, Any]:
    """config.json of an HF CLIPVisionModel; `dtype` as HF names it."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.ffn_hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_attention_heads,
        "num_channels": spec.num_channels,
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "hidden_act": spec.activation_func,
        "layer_norm_eps": spec.layernorm_epsilon,
        "initializer_range": spec.init_method_std,
        "attention_dropout": 0.0,
        "torch_dtype": dtype,
    }


def from_shapes(shape: Callable[[str], tuple[int, ...]], num_layers: int, **given: Any) -> ClipSpec:
    """ClipSpec of weights without a config. Heads are width / 64 unless `given`, which no shape shows."""
    width, _, _, patch = shape("conv1.weight")
    grid = math.isqrt(shape("position_embeddings.weight")[0] - 1)
    return load_config(
        ClipSpec,
        {
            "num_layers": num_layers,
            "hidden_size": width,
            "ffn_hidden_size": shape("decoder.layers.0.mlp.linear_fc1.weight")[0],
            "patch_size": patch,
            "image_size": grid * patch,
            **given,
        },
        what="vision encoder (from the shapes of its weights)",
    )


def _post_layernorm(theirs: str) -> tuple[Rule, ...]:
    """The final norm, which the feature does not pass and our vision encoder does not build."""
    return tuple(
        Rule(f"post_layernorm.{kind}", (f"{theirs}.{kind}",), unused=True, shape_like=f"ln_pre.{kind}")
        for kind in ("weight", "bias")
    )


HF_RULES = RuleSet(
    (
        Reshape("class_token", ("embeddings.class_embedding",), ours=(1, 1, -1), theirs=(-1,)),
        Rule("conv1.weight", ("embeddings.patch_embedding.weight",)),
        Rule("position_embeddings.weight", ("embeddings.position_embedding.weight",)),
        *pair("ln_pre", "pre_layrnorm"),
        *hf_layer_rules(),
        *_post_layernorm("post_layernorm"),
        Drop("embeddings.position_ids"),
    )
)

_OPENAI_LAYER = "visual.transformer.resblocks.{}."

OPENAI_RULES = RuleSet(
    (
        Reshape("class_token", ("visual.class_embedding",), ours=(1, 1, -1), theirs=(-1,)),
        Rule("conv1.weight", ("visual.conv1.weight",)),
        Rule("position_embeddings.weight", ("visual.positional_embedding",)),
        *pair("ln_pre", "visual.ln_pre"),
        *pair(LAYER + "input_layernorm", _OPENAI_LAYER + "ln_1"),
        PackedQKV(LAYER + "self_attention.linear_qkv.weight", (_OPENAI_LAYER + "attn.in_proj_weight",), axis=0),
        PackedQKV(LAYER + "self_attention.linear_qkv.bias", (_OPENAI_LAYER + "attn.in_proj_bias",), axis=0),
        *pair(LAYER + "self_attention.linear_proj", _OPENAI_LAYER + "attn.out_proj", 1),
        *pair(LAYER + "pre_mlp_layernorm", _OPENAI_LAYER + "ln_2"),
        *pair(LAYER + "mlp.linear_fc1", _OPENAI_LAYER + "mlp.c_fc", 0),
        *pair(LAYER + "mlp.linear_fc2", _OPENAI_LAYER + "mlp.c_proj", 1),
        *_post_layernorm("visual.ln_post"),
        Drop("visual.proj"),
    )
)


CLIP = Layout(
    "clip",
    (r"^(vision_model\.)?embeddings\.class_embedding$",),
    (
        Prefix("vision_model.", VISION),
        *(Prefix(name, VISION, name) for name in ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")),
        *(Prefix(name, None) for name in ("text_model.", "visual_projection.", "text_projection.", "logit_scale")),
    ),
    {VISION: "hf"},
    {VISION: "vision_model."},
)
"""HF's CLIPVisionModel or CLIPModel."""

OPENAI_CLIP = Layout(
    "openai-clip",
    (r"^visual\.class_embedding$",),
    (
        Prefix("visual.", VISION, "visual."),
        *(
            Prefix(name, None)
            for name in (
                "transformer.",
                "token_embedding.",
                "ln_final.",
                "positional_embedding",
                "text_projection",
                "logit_scale",
                "input_resolution",
                "context_length",
                "vocab_size",
            )
        ),
    ),
    {VISION: "openai"},
)
"""OpenAI's archives."""


def image_processor(spec: ClipSpec) -> dict[str, Any]:
    """preprocessor_config.json of every CLIP release, at the encoder's size."""
    size = spec.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


def shapes(spec: ClipSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of our tensors; `{}` is the layer."""
    width = spec.hidden_size
    return {"class_token": (1, 1, width), **fixed_size_shapes(spec), **norm_shapes(("ln_pre",), width)}


def build(spec: ClipSpec, runtime):
    """The vision encoder, up to the selected feature."""
    from mindspeed_mm.models.kit.clip import CLIPVisionEncoder

    return CLIPVisionEncoder(spec, runtime)


PART = Part(
    name="clip",
    kind="vision_encoder",
    Spec=ClipSpec,
    model_types=MODEL_TYPES,
    keys=KEYS,
    layouts=(CLIP, OPENAI_CLIP),
    image_processor=image_processor,
    from_hf=from_hf,
    to_hf=to_hf,
    from_shapes=from_shapes,
    rules={"hf": HF_RULES, "openai": OPENAI_RULES, "ours": HF_RULES.own()},
    shapes=shapes,
    build=build,
    checked=CHECKED,
    checked_where={
        "select_layer": "vision_feature_layer",
        "select_feature": "vision_feature_select_strategy",
    },
)
