"""What every text decoder's Spec has: the common keys, rotary scalings, sliding windows, and its traits.

A decoder's file narrows these keys to what its family has, adds its own, and says by `traits` how it differs from
Llama. No torch module here: weights can be read and converted without megatron.core.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import pydantic

from mindspeed_mm.config.load import StrictModel
from mindspeed_mm.models.operations import LayerShape
from mindspeed_mm.models.part import PartSpec, Size, StageLayers, flat_layers, only
from mindspeed_mm.weights.rules import Geometry

Positive = Annotated[float, pydantic.Field(gt=0)]
"""A positive number."""

Factors = Annotated[tuple[Positive, ...], pydantic.Strict(False)]
"""A list of positive numbers (the list need not be a tuple, its numbers are as strict as any)."""

ROPE_KINDS = ("linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class DecoderTraits:
    """How a decoder differs from Llama; the defaults are Llama's.

    windows: positions that each layer's attention sees back, its own among them, None for all; empty: all layers all.
    attention_soft_cap, final_soft_cap: bounds of attention scores and of logits, cap * tanh(x / cap).
    attention_scale: factor on the scores; None: kv_channels ** -0.5.
    embedding_scale: factor on word embeddings (not on image features).
    rotary_channels: channels of a head that are rotated, the first ones; None: all.
    mrope_section: pairs of channels that turn by time, height and width; None: by one position.
    position_offset: rows of a table of learned positions before that of position 0; None: there is no such table.
    alibi_bias_max: ALiBi's, see kit/alibi.py; None: no ALiBi. With neither, positions are rotary.
    norm_bias: whether LayerNorms have biases.
    """

    windows: tuple[int | None, ...] = ()
    attention_soft_cap: float | None = None
    final_soft_cap: float | None = None
    attention_scale: float | None = None
    qk_norm: bool = False
    zero_centered_norm: bool = False
    post_norms: bool = False
    embedding_scale: float | None = None
    rotary_channels: int | None = None
    mrope_section: tuple[int, ...] | None = None
    position_offset: int | None = None
    alibi_bias_max: float | None = None
    norm_bias: bool = True

    @property
    def rotary(self) -> bool:
        """Whether queries and keys are rotated."""
        return self.position_offset is None and self.alibi_bias_max is None

    def window(self, layer: int) -> int | None:
        """Window of a layer, counted over the whole model."""
        return self.windows[layer] if self.windows else None


class RopeScaling(StrictModel):
    """RoPE scaling as in an HF config; kit/rotary.py has the formulas."""

    rope_type: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    factor: Annotated[float, pydantic.Field(ge=1.0)] | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Size | None = None
    attention_factor: Annotated[float, pydantic.Field(ge=0)] | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: Factors | None = None
    long_factor: Factors | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _older_key(cls, data: Any) -> Any:
        """Configs before transformers 4.43 say "type" where later ones say "rope_type"; some hold both."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        kind = data.pop("type", None)
        kind = data.setdefault("rope_type", kind)
        if kind not in ROPE_KINDS:
            raise ValueError(
                f"found RoPE scaling of type {kind!r}; {', '.join(ROPE_KINDS)} are supported. Use weights with one of "
                "these."
            )
        return data

    @pydantic.model_validator(mode="after")
    def _keys_fit(self) -> RopeScaling:
        needed, taken = _ROPE_KEYS[self.rope_type]
        given = [key for key in type(self).model_fields if key != "rope_type" and getattr(self, key) is not None]
        missing = [key for key in needed if key not in given]
        surplus = [key for key in given if key not in (*needed, *taken)]
        if missing:
            raise ValueError(
                f"RoPE scaling {self.rope_type} needs {', '.join(missing)}; found {', '.join(given) or 'nothing'}"
            )
        if surplus:
            raise ValueError(
                f"RoPE scaling {self.rope_type} takes {', '.join((*needed, *taken))}; remove {', '.join(surplus)}"
            )
        return self


_ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        ("factor", "attention_factor"),
    ),
}
"""Keys that each kind needs, and those that it may have beside."""

_DERIVED = ("num_query_groups", "kv_channels", "language_max_sequence_length")
"""Keys whose null means "derive it"."""


class DecoderSpec(PartSpec):
    """text_decoder block of a model.json: the keys that all decoders have."""

    model_id: str
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
    lm_position_embedding_type: Annotated[str, only("rope", why="the decoder has rotary positions")] = "rope"
    rotary_base: Positive = 10000.0
    rope_scaling: RopeScaling | None = None
    normalization: Annotated[str, only("RMSNorm", why="the decoder has RMSNorm")] = "RMSNorm"
    layernorm_epsilon: Positive = 1e-5
    activation_func: Annotated[str, only("silu", why="the decoder's MLP is SwiGLU")] = "silu"
    gated_linear_unit: Annotated[bool, only(True, why="the decoder's MLP is gated")] = True
    add_bias_linear: Annotated[bool, only(False, why="the decoder's other linears have no biases")] = False
    add_qkv_bias: bool = False
    share_embeddings_and_output_weights: bool = False
    is_encoder_decoder: Annotated[bool, only(False, why="it is a decoder")] = False
    tokenizer_padding_side: Annotated[str, only("right", why="batches are padded on the right")] = "right"
    neftune_noise_alpha: Annotated[float, pydantic.Field(ge=0)] = 0.0
    """Noise on the word embeddings in training (models/neftune.py)."""
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
    def _shapes_fit(self) -> DecoderSpec:
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
        if self.language_max_sequence_length > self.max_position_embeddings:
            raise ValueError(
                f"language_max_sequence_length {self.language_max_sequence_length} is more than "
                f"max_position_embeddings {self.max_position_embeddings}; lower the first or raise the second"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _rotation_fits(self) -> DecoderSpec:
        traits = self.traits
        channels = traits.rotary_channels or self.kv_channels
        if not traits.rotary:
            return self
        if channels % 2:
            what = "kv_channels" if traits.rotary_channels is None else "rotated channels"
            raise ValueError(f"{what} {channels} is odd; rotary positions rotate pairs of channels")
        if traits.mrope_section is not None and sum(traits.mrope_section) != channels // 2:
            raise ValueError(
                f"mrope_section {list(traits.mrope_section)} sums up to {sum(traits.mrope_section)}; expected "
                f"{channels // 2}, half of the {channels} rotated channels of a head"
            )
        if traits.mrope_section is not None and getattr(self.rope_scaling, "rope_type", None) == "longrope":
            raise ValueError(
                "rope_scaling longrope does not go with mrope_section: which factors hold follows from the length of a "
                "text, which positions of images do not tell. Use weights with linear, yarn or no scaling"
            )
        for key in ("short_factor", "long_factor"):
            factors = getattr(self.rope_scaling, key, None)
            if factors is not None and len(factors) != channels // 2:
                raise ValueError(
                    f"rope_scaling.{key} has {len(factors)} numbers; expected {channels // 2}, one for each pair of "
                    "rotated channels"
                )
        return self

    @property
    def traits(self) -> DecoderTraits:
        """How it differs from Llama."""
        return DecoderTraits()

    @property
    def layer(self) -> LayerShape:
        traits = self.traits
        return replace(
            super().layer,
            norms=4 if traits.post_norms else 2,
            qk_norm=traits.qk_norm,
            soft_cap=traits.attention_soft_cap is not None,
            rotary=traits.rotary,
        )

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


LayerTypes = Annotated[tuple[Literal["full_attention", "sliding_attention"], ...], pydantic.Strict(False)]
"""HF's kind of each layer."""


class WindowedSpec(DecoderSpec):
    """A decoder some or all of whose layers see a sliding window."""

    sliding_window: Size | None = None
    """Positions that a windowed layer sees back, its own among them; None: no layer has a window."""
    layer_types: LayerTypes | None = None
    """HF's list: which layers have the window; None: as the family has it."""

    @pydantic.model_validator(mode="after")
    def _layers_fit(self) -> WindowedSpec:
        if self.layer_types is not None and len(self.layer_types) != self.num_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries; expected {self.num_layers}, one for each layer"
            )
        if self.sliding_window is None and "sliding_attention" in (self.layer_types or ()):
            raise ValueError('layer_types has "sliding_attention", but sliding_window is null; give the window')
        return self

    def default_layer_types(self) -> LayerTypes:
        """The family's layers where the spec names none: all with the window."""
        return ("sliding_attention",) * self.num_layers

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer; () where none has one."""
        if self.sliding_window is None:
            return ()
        kinds = self.layer_types or self.default_layer_types()
        return tuple(self.sliding_window if kind == "sliding_attention" else None for kind in kinds)

    @property
    def traits(self) -> DecoderTraits:
        return DecoderTraits(windows=self.windows)
