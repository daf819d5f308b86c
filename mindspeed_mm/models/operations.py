"""What a part states about its work. Operations, kept bytes and traffic follow from it, so that planning and the log's
TFLOP/s know no part by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

Grid = Sequence[int]
"""Time, height and width of an item, as in Media."""


@dataclass(frozen=True)
class EncoderWork:
    """What a vision encoder and a projector have to do for some items. Work of several items is their sum."""

    rows: float = 0.0
    """Rows of pixels (images, tiles or patches): what context-parallel ranks share, where each is encoded by itself."""

    pixels: float = 0.0
    """Values of the pixels."""

    positions: float = 0.0
    """Positions that go through the encoder's layers."""

    patches: float = 0.0
    """Patches that are embedded."""

    features: float = 0.0
    """Features that the linears of the projector run on."""

    pairs: float = 0.0
    """Pairs of positions that attend to one another, over all layers of the encoder."""

    tokens: float = 0.0
    """Positions that the items take in the text, where that is known."""

    items: float = 0.0
    """Images and videos."""

    def times(self, factor: float) -> EncoderWork:
        """The work of `factor` times as many items."""
        return EncoderWork(*(factor * getattr(self, field.name) for field in fields(self)))

    def __add__(self, other: EncoderWork) -> EncoderWork:
        return EncoderWork(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """A transformer layer: self-attention and an MLP, each behind a norm."""

    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    ffn_hidden_size: int
    gated: bool
    activation_saves: int
    """Tensors of the MLP's width that its activation keeps for the backward pass."""
    norm_statistics: int
    """Numbers that a norm keeps of a row: 1 for RMSNorm, 2 for LayerNorm."""
    norms: int = 2
    """Norms over the whole width."""
    qk_norm: bool = False
    """Whether each head's queries and keys are normed."""
    soft_cap: bool = False
    """Whether attention scores are bounded, which no fused kernel does."""
    rotary: bool = True
    segments: bool = False
    """Whether attention of a row without padding stays inside parts of it, whose outputs are put together."""

    @property
    def weights(self) -> int:
        """Elements of its linears: multiply-adds for one position."""
        heads, groups = self.num_attention_heads, self.num_query_groups
        return self.hidden_size * self.kv_channels * (2 * heads + 2 * groups) + self.mlp_weights

    @property
    def mlp_weights(self) -> int:
        """Elements of its MLP's linears."""
        return self.hidden_size * self.ffn_hidden_size * (3 if self.gated else 2)


@dataclass(frozen=True)
class CrossShape:
    """Gated cross-attention in front of some layers of a decoder, to features beside the text."""

    blocks: int
    every: int
    """A block stands in front of each layer whose number, counted from 1, is a multiple of this."""
    names: str
    """What the names of its parameters begin with, `{}` for the layer."""
    tokens: float
    """Weights that each token of the text meets in a block."""
    features: float
    """Weights that each feature meets."""
    heads: int
    head_size: int
    hidden_size: int
    ffn_hidden_size: int
    memory_size: int
    """Width of the features."""

    def on(self, layers: Iterable[int]) -> int:
        """Blocks in front of some layers, whose numbers count from 0."""
        return sum((layer + 1) % self.every == 0 for layer in layers)


@dataclass(frozen=True)
class Product:
    """A linear of a projector: rows [rows, inputs] times a weight [inputs, outputs]."""

    rows: float
    inputs: int
    outputs: int
    kept: float = 0.0
    """Values that are kept for the gradient of its weight, where it is trained."""
    activated: float = 0.0
    """Values that the activation before it keeps, wherever gradients flow."""
    shared: bool = False
    """Whether these are the values that are kept for the gradient of its weight: the activation's result."""
    behind_weights: bool = False
    """Whether its input depends on weights of the projector, so that it has a gradient though no encoder is trained."""
    split: bool = False
    """Whether tensor parallelism splits its input, so that its outputs are summed over the ranks."""
    keys: int = 0
    """Keys that each query looks at, where these are attention's own products and not a linear's."""
