"""Llama decoder (Llama 1-3, Vicuna): spec, HF config and weight rules.

Letters: V vocabulary, H hidden size, F MLP size, N heads, G query groups, D channels per head.
"""

from typing import Annotated, Any, Literal

import pydantic

from mindspeed_mm.config.load import StrictModel, load_config
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.part import Part, PartSpec, Size, StageLayers, flat_layers, only
from mindspeed_mm.weights.rules import QKV, Drop, GateUp, Geometry, Rule, RuleSet, Vocab

HF_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
"""Values of keys that a config.json may omit: the documented defaults of transformers' LlamaConfig."""

MODEL_TYPES = ("llama", "llava_llama", "llava")
"""model_type of Llama itself and of LLaVA's subclasses, whose config.json holds the same keys."""


class RopeScaling(StrictModel):
    """RoPE scaling as in an HF config: linear (position / factor) or llama3 (by wavelength, Llama 3.1 report)."""

    rope_type: Literal["linear", "llama3"]
    factor: Annotated[float, pydantic.Field(ge=1.0)]
    low_freq_factor: Annotated[float, pydantic.Field(gt=0)] | None = None
    high_freq_factor: Annotated[float, pydantic.Field(gt=0)] | None = None
    original_max_position_embeddings: Size | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _older_key(cls, data: Any) -> Any:
        """Configs before transformers 4.43 say "type" where later ones say "rope_type"; some hold both."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        kind = data.pop("type", None)
        kind = data.setdefault("rope_type", kind)
        if kind not in ("linear", "llama3"):
            raise ValueError(
                f"found RoPE scaling of type {kind!r}; linear and llama3 are supported. Use weights with one of these."
            )
        return data

    @pydantic.model_validator(mode="after")
    def _llama3_is_complete(self) -> "RopeScaling":
        keys = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        given = [key for key in keys if getattr(self, key) is not None]
        if self.rope_type == "llama3" and len(given) < len(keys):
            raise ValueError(f"RoPE scaling llama3 needs {', '.join(keys)}; found {', '.join(given) or 'none of them'}")
        if self.rope_type == "linear" and given:
            raise ValueError(f"RoPE scaling linear takes factor alone; remove {', '.join(given)}")
        return self


class LlamaSpec(PartSpec):
    """text_decoder block of a model.json."""

    model_id: Literal["llama"] = "llama"
    num_layers: Size
    hidden_size: Size
    num_attention_heads: Size
    num_query_groups: Size = None  # heads: multi-head attention
    kv_channels: Size = None  # hidden_size / heads
    ffn_hidden_size: Size
    language_vocab_size: Size
    """Rows of the embedding as stored in the weights (llava-hf pads them beyond the tokenizer's size)."""
    max_position_embeddings: Size = 4096
    language_max_sequence_length: Size = None  # max_position_embeddings
    lm_position_embedding_type: Annotated[str, only("rope", why="Llama has rotary positions")] = "rope"
    rotary_base: Annotated[float, pydantic.Field(gt=0)] = 10000.0
    rope_scaling: RopeScaling | None = None
    normalization: Annotated[str, only("RMSNorm", why="Llama has RMSNorm")] = "RMSNorm"
    layernorm_epsilon: Annotated[float, pydantic.Field(gt=0)] = 1e-5
    activation_func: Annotated[str, only("silu", why="Llama's MLP is SwiGLU")] = "silu"
    gated_linear_unit: Annotated[bool, only(True, why="Llama's MLP is SwiGLU")] = True
    add_bias_linear: Annotated[bool, only(False, why="Llama has no biases")] = False
    add_qkv_bias: bool = False
    share_embeddings_and_output_weights: bool = False
    is_encoder_decoder: Annotated[bool, only(False, why="Llama is a decoder")] = False
    tokenizer_padding_side: Annotated[str, only("right", why="batches are padded on the right")] = "right"
    pipeline_num_layers: StageLayers | None = None
    """Layers of each pipeline stage; None: equal shares. Only the first may be 0 (it holds the vision encoder)."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """Derive what is not given; norm_epsilon is another name of layernorm_epsilon."""
        if not isinstance(data, dict):
            return data
        data = {key: value for key, value in data.items() if value is not None or key not in _DERIVED}
        if "norm_epsilon" in data:
            if "layernorm_epsilon" in data:
                raise ValueError("found both norm_epsilon and layernorm_epsilon; keep one, they are the same setting")
            data["layernorm_epsilon"] = data.pop("norm_epsilon")
        heads, hidden = data.get("num_attention_heads"), data.get("hidden_size")
        if heads is not None:
            data.setdefault("num_query_groups", heads)
        if isinstance(heads, int) and isinstance(hidden, int) and heads > 0 and hidden % heads == 0:
            data.setdefault("kv_channels", hidden // heads)
        data.setdefault("language_max_sequence_length", data.get("max_position_embeddings", 4096))
        return data

    @pydantic.field_validator("rope_scaling", mode="before")
    @classmethod
    def _default_is_unscaled(cls, value: Any) -> Any:
        unscaled = isinstance(value, dict) and value.get("rope_type", value.get("type")) == "default"
        return None if unscaled else value

    @pydantic.model_validator(mode="after")
    def _shapes_fit(self) -> "LlamaSpec":
        if self.kv_channels is None:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}; "
                "correct one of them or give kv_channels"
            )
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_query_groups "
                f"{self.num_query_groups}; every group must serve equally many heads"
            )
        stages = flat_layers(self.pipeline_num_layers or [])
        if self.pipeline_num_layers is not None and (sum(stages) != self.num_layers or 0 in stages[1:]):
            raise ValueError(
                f"pipeline_num_layers {self.pipeline_num_layers} does not share out num_layers {self.num_layers}; its "
                "sum must be that, and only the first stage may have 0"
            )
        if self.kv_channels % 2:
            raise ValueError(f"kv_channels {self.kv_channels} is odd; rotary positions rotate pairs of channels")
        if self.language_max_sequence_length > self.max_position_embeddings:
            raise ValueError(
                f"language_max_sequence_length {self.language_max_sequence_length} is more than "
                f"max_position_embeddings {self.max_position_embeddings}; lower the first or raise the second"
            )
        return self

    @property
    def geometry(self) -> Geometry:
        return Geometry(
            num_layers=self.num_layers,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            kv_channels=self.kv_channels,
            vocab_size=self.language_vocab_size,
            qkv_bias=self.add_qkv_bias,
            tied=self.share_embeddings_and_output_weights,
        )


_DERIVED = ("num_query_groups", "kv_channels", "language_max_sequence_length")
"""Keys whose null means "derive it"."""


def from_hf(config: dict[str, Any]) -> LlamaSpec:
    """LlamaSpec of an HF Llama config.json of any age (also LLaVA's, whose keys are the same).

    Raises ConfigError for another architecture and for variants that we do not build.
    """
    kind = config.get("model_type", "llama")
    if kind not in MODEL_TYPES:
        raise ConfigError(f'text decoder config: found model_type "{kind}"; expected one of {", ".join(MODEL_TYPES)}.')
    full = {**HF_DEFAULTS, **config}
    biased = [key for key in ("attention_bias", "mlp_bias") if full[key]]
    if biased:
        raise ConfigError(f"text decoder config: found {' and '.join(biased)} true; Llama without biases is supported.")
    base, scaling = _rope(full)
    return load_config(
        LlamaSpec,
        {
            "num_layers": full["num_hidden_layers"],
            "hidden_size": full["hidden_size"],
            "num_attention_heads": full["num_attention_heads"],
            "num_query_groups": full["num_key_value_heads"],
            "kv_channels": full["head_dim"],
            "ffn_hidden_size": full["intermediate_size"],
            "language_vocab_size": full["vocab_size"],
            "max_position_embeddings": full["max_position_embeddings"],
            "rotary_base": base,
            "rope_scaling": scaling,
            "layernorm_epsilon": full["rms_norm_eps"],
            "activation_func": full["hidden_act"],
            "share_embeddings_and_output_weights": full["tie_word_embeddings"],
            "init_method_std": full["initializer_range"],
            "params_dtype": full.get("dtype") or full.get("torch_dtype"),
        },
        what="text decoder config",
    )


def to_hf(spec: LlamaSpec, dtype: str) -> dict[str, Any]:
    """config.json of an HF Llama, with keys that transformers of every age reads; `dtype` as HF names it."""
    scaling = spec.rope_scaling.model_dump(exclude_none=True) if spec.rope_scaling else None
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": spec.language_vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.ffn_hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_query_groups,
        "head_dim": spec.kv_channels,
        "hidden_act": spec.activation_func,
        "max_position_embeddings": spec.max_position_embeddings,
        "initializer_range": spec.init_method_std,
        "rms_norm_eps": spec.layernorm_epsilon,
        "rope_theta": spec.rotary_base,
        "rope_scaling": scaling,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": spec.share_embeddings_and_output_weights,
        "torch_dtype": dtype,
    }


def _rope(config: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(base, scaling) from rope_theta + rope_scaling (before transformers 5) or rope_parameters (since)."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    base = parameters.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    if parameters.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("text decoder config: found a partial_rotary_factor; Llama rotates all channels of a head.")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    return base, None if kind == "default" else parameters


_LAYER = "decoder.layers.{}."
_HF_LAYER = "model.layers.{}."

HF_RULES = RuleSet(
    (
        Vocab("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), axis=0),
        Rule(_LAYER + "input_layernorm.weight", (_HF_LAYER + "input_layernorm.weight",)),
        QKV(
            _LAYER + "self_attention.linear_qkv.weight",
            tuple(f"{_HF_LAYER}self_attn.{name}_proj.weight" for name in "qkv"),
            axis=0,
        ),
        QKV(
            _LAYER + "self_attention.linear_qkv.bias",
            tuple(f"{_HF_LAYER}self_attn.{name}_proj.bias" for name in "qkv"),
            axis=0,
            needs="qkv_bias",
        ),
        Rule(_LAYER + "self_attention.linear_proj.weight", (_HF_LAYER + "self_attn.o_proj.weight",), axis=1),
        Rule(_LAYER + "pre_mlp_layernorm.weight", (_HF_LAYER + "post_attention_layernorm.weight",)),
        GateUp(
            _LAYER + "mlp.linear_fc1.weight",
            (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
            axis=0,
        ),
        Rule(_LAYER + "mlp.linear_fc2.weight", (_HF_LAYER + "mlp.down_proj.weight",), axis=1),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
        Vocab("output_layer.weight", ("lm_head.weight",), axis=0),
        Drop("model.layers.{}.self_attn.rotary_emb.inv_freq"),
        Drop("model.rotary_emb.inv_freq"),
    ),
    tied=("output_layer.weight", "embedding.word_embeddings.weight"),
)


def shapes(spec: LlamaSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of our tensors; `{}` is the layer."""
    hidden, vocabulary = spec.hidden_size, (spec.language_vocab_size, spec.hidden_size)
    heads = spec.num_attention_heads * spec.kv_channels
    qkv = heads + 2 * spec.num_query_groups * spec.kv_channels
    return {
        "embedding.word_embeddings.weight": vocabulary,
        _LAYER + "input_layernorm.weight": (hidden,),
        _LAYER + "self_attention.linear_qkv.weight": (qkv, hidden),
        _LAYER + "self_attention.linear_qkv.bias": (qkv,),
        _LAYER + "self_attention.linear_proj.weight": (hidden, heads),
        _LAYER + "pre_mlp_layernorm.weight": (hidden,),
        _LAYER + "mlp.linear_fc1.weight": (2 * spec.ffn_hidden_size, hidden),
        _LAYER + "mlp.linear_fc2.weight": (hidden, spec.ffn_hidden_size),
        "decoder.final_layernorm.weight": (hidden,),
        "output_layer.weight": vocabulary,
    }


def build(
    spec: LlamaSpec, runtime, *, pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None
):
    """The decoder's layers of this (virtual) pipeline stage; models.runtime.Runtime says how it is spread."""
    from mindspeed_mm.models.modules.llama import LlamaDecoder

    return LlamaDecoder(spec, runtime, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage)


PART = Part(
    name="llama",
    kind="text_decoder",
    Spec=LlamaSpec,
    from_hf=from_hf,
    to_hf=to_hf,
    rules={"hf": HF_RULES, "ours": HF_RULES.own()},
    shapes=shapes,
    build=build,
    checked=(
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "ffn_hidden_size",
        "language_vocab_size",
        "rotary_base",
        "rope_scaling",
        "layernorm_epsilon",
        "share_embeddings_and_output_weights",
    ),
)
