"""SigLIP vision transformer: spec, HF config and weight rules.

There is no class token, so every feature is a patch. The feature is a hidden state before the final norm: layers behind
it, that norm and the pooling head are never built, and conversions carry them.
Letters: H width, F MLP size, N heads, D channels per head.
"""

from dataclasses import dataclass
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
    linear_shapes,
    norm_shapes,
    pair,
)
from mindspeed_mm.models.part import Part, only
from mindspeed_mm.weights.layouts import VISION, Layout, Prefix
from mindspeed_mm.weights.rules import Drop, Geometry, Own, Reshape, Rule, RuleSet

HF_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "vision_use_head": True,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
"""Values of keys that a config.json may omit: the documented defaults of transformers' SiglipVisionConfig; without the
two vision_feature keys the feature is the last hidden state before the final norm."""

KEYS = file_keys(
    "SigLIP vision encoder config",
    (*HF_DEFAULTS, "dtype", "torch_dtype", "vision_config"),
    {**NO_CONFIG, "dropout": (0,)},
    (*COMMON, *OLD_OPTIONS, "text_config", "projection_dim"),
)
"""Of a SiglipVisionConfig, and of a SiglipConfig with its vision_config; the text model is not used."""

MODEL_TYPES = ("siglip_vision_model", "siglip")


@dataclass(frozen=True)
class SiglipGeometry(Geometry):
    """A Geometry that says whether a source has the pooling head."""

    pooling_head: bool = True


class SiglipSpec(FixedSizeSpec):
    """image_encoder.vision_encoder block of a model.json."""

    architecture = "SigLIP"

    model_id: Literal["siglip"] = "siglip"
    add_class_token: Annotated[bool, only(False, why="SigLIP has no class token")] = False
    class_token_len: Annotated[int, only(0, why="SigLIP has no class token")] = 0
    select_layer: SelectLayer = -1
    select_feature: Literal["patch", "cls_patch"] = "patch"
    """Both of LLaVA's words mean all patches here."""
    activation_func: Literal["gelu_pytorch_tanh", "gelu", "quick_gelu"] = "gelu_pytorch_tanh"
    gated_linear_unit: Annotated[bool, only(False, why="SigLIP's MLP has no gate")] = False
    add_bias_linear: Annotated[bool, only(True, why="SigLIP's linears have biases")] = True
    add_qkv_bias: Annotated[bool, only(True, why="SigLIP's linears have biases")] = True
    normalization: Annotated[str, only("LayerNorm", why="SigLIP has LayerNorm")] = "LayerNorm"
    layernorm_epsilon: Annotated[float, pydantic.Field(gt=0)] = 1e-6
    post_layer_norm: Annotated[bool, only(False, why="the feature is taken before the final norm")] = False
    vision_use_head: bool = True
    """Whether the source has a pooling head, which is carried by conversions and never built."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """Derive what is not given or null."""
        data = cls.derived(data)
        if not isinstance(data, dict):
            return data
        return data | ({"select_feature": "patch"} if data.get("select_feature") == "cls_patch" else {})

    @pydantic.model_validator(mode="after")
    def _shapes_fit(self) -> "SiglipSpec":
        self.check_heads()
        self.check_image()
        self.check_stages()
        return self

    @property
    def num_image_tokens(self) -> int:
        """Vectors that one image gives to the projector."""
        return self.num_positions

    @property
    def geometry(self) -> SiglipGeometry:
        return SiglipGeometry(
            num_layers=self.num_built_layers,
            source_layers=self.num_layers,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            kv_channels=self.kv_channels,
            pooling_head=self.vision_use_head,
        )


_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "patch_size": "patch_size",
    "image_size": "image_size",
    "num_channels": "num_channels",
    "activation_func": "hidden_act",
    "layernorm_epsilon": "layer_norm_eps",
    "attention_dropout": "attention_dropout",
    "vision_use_head": "vision_use_head",
}
"""Our keys and HF's."""


def from_hf(config: dict[str, Any]) -> SiglipSpec:
    """SiglipSpec of an HF SiglipVisionConfig or SiglipConfig, optionally with LLaVA's two vision_feature keys beside.

    Raises ConfigError for another architecture, and for the strategy "default".
    """
    kind = config.get("model_type", "siglip_vision_model")
    if kind not in MODEL_TYPES:
        raise ConfigError(f'vision encoder config: found model_type "{kind}"; expected {" or ".join(MODEL_TYPES)}.')
    full = {**HF_DEFAULTS, **config, **(config.get("vision_config") or {})}
    KEYS.check(full)
    strategy = full["vision_feature_select_strategy"]
    if strategy != "full":
        raise ConfigError(
            f'vision encoder config: found vision_feature_select_strategy {strategy!r}; expected "full". SigLIP has no '
            'class token, so that "default" would drop the first patch. Set it to "full" in config.json, if the model '
            "was trained with all patches."
        )
    block = {ours: full[theirs] for ours, theirs in _KEYS.items()}
    chosen = {
        "select_layer": full["vision_feature_layer"],
        "params_dtype": full.get("dtype") or full.get("torch_dtype"),
    }
    return load_config(SiglipSpec, block | chosen, what="vision encoder config", names=_KEYS)


def to_hf(spec: SiglipSpec, dtype: str) -> dict[str, Any]:
    """config.json of an HF SiglipVisionModel; `dtype` as HF names it."""
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        **{theirs: getattr(spec, ours) for ours, theirs in _KEYS.items()},
        "torch_dtype": dtype,
    }


_HEAD = "pooling_head."


def _pooling_head() -> tuple[Rule, ...]:
    """The attention that pools all patches, which the feature does not pass."""
    options = {"needs": "pooling_head", "unused": True}
    layer = LAYER.format(0)

    def pair(name: str, like: str) -> list[Rule]:
        return [
            Rule(f"{_HEAD}{name}.{kind}", (f"head.{name}.{kind}",), shape_like=f"{layer}{like}.{kind}", **options)
            for kind in ("weight", "bias")
        ]

    probe = Reshape(
        _HEAD + "probe", ("head.probe",), shape_like="conv1.bias", ours=(1, 1, -1), theirs=(1, 1, -1), **options
    )
    in_proj = (
        Rule(
            f"{_HEAD}attention.in_proj_{kind}",
            (f"head.attention.in_proj_{kind}",),
            shape_like=f"{layer}self_attention.linear_qkv.{kind}",
            **options,
        )
        for kind in ("weight", "bias")
    )
    return (
        probe,
        *in_proj,
        *pair("attention.out_proj", "self_attention.linear_proj"),
        *pair("layernorm", "input_layernorm"),
        *pair("mlp.fc1", "mlp.linear_fc1"),
        *pair("mlp.fc2", "mlp.linear_fc2"),
    )


HF_RULES = RuleSet(
    (
        *pair("conv1", "embeddings.patch_embedding"),
        Rule("position_embeddings.weight", ("embeddings.position_embedding.weight",)),
        *hf_layer_rules(),
        *pair("post_layernorm", "post_layernorm", unused=True, shape_like="decoder.layers.0.input_layernorm.bias"),
        *_pooling_head(),
        Drop("embeddings.position_ids"),
    )
)

OWN_RULES = RuleSet(
    (
        *HF_RULES.own().rules,
        *(
            Own(rule.target, (rule.target,), needs=rule.needs, unused=True, like=rule)
            for rule in HF_RULES.rules
            if isinstance(rule, Rule) and rule.unused
        ),
    )
)
"""Our files keep what the feature does not pass, too."""


SIGLIP = Layout(
    "siglip",
    (
        r"^(vision_model\.)?embeddings\.patch_embedding\.bias$",
        r"^(vision_model\.)?embeddings\.position_embedding\.weight$",
        r"^(vision_model\.)?encoder\.layers\.0\.self_attn\.q_proj\.weight$",
    ),
    (
        Prefix("vision_model.", VISION),
        *(Prefix(name, VISION, name) for name in ("embeddings.", "encoder.", "post_layernorm.", "head.")),
        *(Prefix(name, None) for name in ("text_model.", "logit_scale", "logit_bias")),
    ),
    {VISION: "hf"},
    {VISION: "vision_model."},
)
"""HF's SiglipVisionModel (its tensors under `vision_model.` before transformers 5, under no prefix since) or
SiglipModel."""


def image_processor(spec: SiglipSpec) -> dict[str, Any]:
    """preprocessor_config.json of every SigLIP release of one resolution, at the encoder's size."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": spec.image_size, "width": spec.image_size},
    }


def shapes(spec: SiglipSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of our tensors; `{}` is the layer."""
    width, inner = spec.hidden_size, spec.ffn_hidden_size
    head = {"attention.out_proj": (width, width), "mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    return {
        **fixed_size_shapes(spec),
        "conv1.bias": (width,),
        _HEAD + "probe": (1, 1, width),
        _HEAD + "attention.in_proj_weight": (3 * width, width),
        _HEAD + "attention.in_proj_bias": (3 * width,),
        **linear_shapes({_HEAD + name: shape for name, shape in head.items()}),
        **norm_shapes((_HEAD + "layernorm",), width),
    }


def build(spec: SiglipSpec, runtime):
    """The vision encoder, up to the selected feature."""
    from mindspeed_mm.models.kit.siglip import SiglipVisionEncoder

    return SiglipVisionEncoder(spec, runtime)


PART = Part(
    name="siglip",
    kind="vision_encoder",
    Spec=SiglipSpec,
    model_types=MODEL_TYPES,
    keys=KEYS,
    layouts=(SIGLIP,),
    image_processor=image_processor,
    from_hf=from_hf,
    to_hf=to_hf,
    rules={"hf": HF_RULES, "ours": OWN_RULES},
    shapes=shapes,
    build=build,
    checked=CHECKED,
    checked_where={"select_layer": "vision_feature_layer"},
)
