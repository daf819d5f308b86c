"""Gated cross-attention in the Spec of a text decoder. No torch module here.

Letters: H width of the decoder, W width of the features, N heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import pydantic

from mindspeed_mm.config.load import StrictModel, load_config
from mindspeed_mm.models.kit.decoder_spec import DecoderSpec
from mindspeed_mm.models.operations import CrossShape
from mindspeed_mm.models.part import Size
from mindspeed_mm.weights.rules import Geometry

CROSS = "decoder.layers.{}.gated_cross."

EXPANSION = 4
"""Width of the block's MLP over the decoder's."""

PLAIN = "hf"
"""The dialect of decoders alone."""

PUBLIC = (FLAMINGO, OTTER) = ("flamingo", "otter")
"""Dialects of OpenFlamingo and of Otter."""


class CrossAttentionSpec(StrictModel):
    """text_decoder.cross_attention of a model.json."""

    every: Size
    """A block stands in front of each layer whose number, counted from 1, is a multiple of this."""
    memory_size: Size
    """Width of the features that it attends to."""
    media_token_id: Annotated[int, pydantic.Field(ge=0)]
    """Token that stands in the text where an image is."""
    num_attention_heads: Size = 8
    kv_channels: Size = 64
    latest_only: bool = True
    """A token sees the last image before it alone; false: all before it."""
    fresh: bool = False
    """The weights are those of a decoder without it: random values, its gates at zero, so that it changes nothing."""


class CrossDecoderSpec(DecoderSpec):
    """A decoder that may have gated cross-attention."""

    cross_attention: CrossAttentionSpec | None = None

    @pydantic.model_validator(mode="after")
    def _cross_attention_fits(self) -> CrossDecoderSpec:
        cross = self.cross_attention
        if cross is None:
            return self
        if cross.every > self.num_layers:
            raise ValueError(
                f"cross_attention.every is {cross.every} and there are {self.num_layers} layers, so that no layer has "
                "cross-attention; expected at most the number of layers. Lower it"
            )
        if cross.media_token_id >= self.language_vocab_size:
            raise ValueError(
                f"cross_attention.media_token_id is {cross.media_token_id}; expected an id below language_vocab_size "
                f"{self.language_vocab_size}. Give the id that the tokenizer has for <image>, and weights whose "
                "vocabulary holds it"
            )
        return self

    @property
    def geometry(self) -> Geometry:
        cross = self.cross_attention
        return replace(super().geometry, cross_stride=None if cross is None else (cross.every - 1, cross.every))

    @property
    def cross_shape(self) -> CrossShape | None:
        cross = self.cross_attention
        if cross is None:
            return None
        hidden, size = self.hidden_size, cross.num_attention_heads * cross.kv_channels
        tokens = 2 * hidden * size + 2 * EXPANSION * hidden * hidden
        return CrossShape(
            blocks=self.num_layers // cross.every,
            every=cross.every,
            names=CROSS,
            tokens=tokens,
            features=2 * cross.memory_size * size,
            heads=cross.num_attention_heads,
            head_size=cross.kv_channels,
            hidden_size=hidden,
            ffn_hidden_size=EXPANSION * hidden,
            memory_size=cross.memory_size,
        )

    @property
    def fresh_names(self) -> tuple[str, ...]:
        cross = self.cross_attention
        if cross is None or not cross.fresh:
            return ()
        layers = range(cross.every - 1, self.num_layers, cross.every)
        return tuple(CROSS.replace("{}", str(layer)) for layer in layers)

    def lacking(self, dialect: str) -> str | None:
        cross = self.cross_attention
        if cross is None:
            return None
        if dialect == PLAIN and not cross.fresh:
            return (
                "they are those of a decoder without gated cross-attention; set text_decoder.cross_attention.fresh "
                "true to begin it with gates at zero, or give the weights of a Flamingo"
            )
        if dialect in PUBLIC and cross.fresh:
            return (
                "they hold gated cross-attention, which text_decoder.cross_attention.fresh true would leave unused; "
                "set fresh false, or give the weights of a decoder alone"
            )
        return None


def with_cross_shapes(shapes: Callable[[Any], dict[str, tuple[int, ...]]]) -> Callable[[Any], dict]:
    """`shapes` of a decoder's Part, with those of the cross-attention that its spec may have."""

    def both(spec: CrossDecoderSpec) -> dict[str, tuple[int, ...]]:
        found, cross = shapes(spec), spec.cross_attention
        if cross is None:
            return found
        hidden, size = spec.hidden_size, cross.num_attention_heads * cross.kv_channels
        own = {
            "linear_q.weight": (size, hidden),
            "linear_kv.weight": (2 * size, cross.memory_size),
            "linear_proj.weight": (hidden, size),
            "mlp.linear_fc1.weight": (EXPANSION * hidden, hidden),
            "mlp.linear_fc2.weight": (hidden, EXPANSION * hidden),
            "attention_gate": (1,),
            "mlp_gate": (1,),
        }
        for norm in ("attention_norm", "mlp.norm"):
            own |= {f"{norm}.{kind}": (hidden,) for kind in ("weight", "bias")}
        return found | {CROSS + name: shape for name, shape in own.items()}

    return both


def with_cross_config(from_hf: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    """`from_hf` of a decoder's Part, for configs in which a family has put its cross-attention."""

    def both(config: dict[str, Any]) -> Any:
        if "cross_attention" not in config:
            return from_hf(config)
        plain = from_hf({key: value for key, value in config.items() if key != "cross_attention"})
        fields = {name: getattr(plain, name) for name in type(plain).model_fields}
        return load_config(
            type(plain), fields | {"cross_attention": config["cross_attention"]}, what="text decoder config"
        )

    return both
