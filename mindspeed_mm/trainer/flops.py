"""Floating-point operations of a training step, counted from the model's shapes.

A multiply-add counts as two. Matrix products and attention are counted, norms, activations and softmax are not
(the usual model-FLOP convention of PaLM, appendix B, and Megatron-LM). Recomputation is not counted. Causal attention
counts half the square, and under a sliding window what the window leaves of it. The backward pass costs one forward
pass where gradients flow through a part and another one where its weights are trained; attention itself, which has no
weights, costs two wherever gradients flow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mindspeed_mm.models.media import Media


def transformer_flops(
    *,
    layers: int,
    hidden: int,
    heads: int,
    groups: int,
    head_size: int,
    ffn: int,
    gated: bool,
    lengths: Iterable[float],
    causal: bool,
    windows: Sequence[int | None] = (),
) -> float:
    """Forward operations of a stack of transformer layers over sequences of the given lengths. `windows` are those of
    its layers (see `stack_score_flops`)."""
    lengths = list(lengths)
    products = sum(lengths) * _layer_products(hidden, heads, groups, head_size, ffn, gated)
    scores = stack_score_flops(
        layers=layers, windows=windows, heads=heads, head_size=head_size, lengths=lengths, causal=causal
    )
    return layers * products + scores


def _layer_products(hidden: int, heads: int, groups: int, head_size: int, ffn: int, gated: bool) -> float:
    """Operations of a layer's linears for one position."""
    attention_weights = hidden * head_size * (heads + 2 * groups) + heads * head_size * hidden
    return 2.0 * (attention_weights + hidden * ffn * (3 if gated else 2))


def stack_score_flops(*, layers: int, windows: Sequence[int | None], **one: Any) -> float:
    """Forward operations of the attention itself over a stack of layers; `windows` has the window of each layer (empty:
    none has one), `one` what `score_flops` takes beside."""
    known = {window: score_flops(**one, window=window) for window in {*windows, None}}
    return sum(known[window] for window in windows) if windows else layers * known[None]


def score_flops(
    *, heads: int, head_size: int, lengths: Iterable[float], causal: bool, window: int | None = None
) -> float:
    """Forward operations of one layer's attention itself: QK^T and the product with V. `window`: positions that a
    causal query sees back, None for all."""
    pairs = sum(_causal_pairs(length, window) if causal else length * length for length in lengths)
    return 4.0 * heads * head_size * pairs


def _causal_pairs(length: float, window: int | None) -> float:
    """Pairs of a query and a key that it sees: half the square, less the triangle that lies before the window."""
    hidden = 0.0 if window is None else max(0.0, length - window)
    return (length * length - hidden * hidden) * 0.5


@dataclass(frozen=True)
class ForwardFlops:
    """Forward operations of a micro-batch, by part."""

    patches: float
    """The vision encoder's patch embedding, whose input needs no gradient."""
    vision_encoder: float
    projector: float
    """All its linears."""
    projector_first: float
    """The first of them, whose input needs no gradient while the vision encoder is frozen."""
    decoder: float
    """Layers, attention included."""
    scores: float
    """The attention in them: QK^T and the product with V."""
    head: float


def forward_flops(
    spec,
    *,
    lengths: Iterable[float],
    images: float,
    supervised: float,
    encoded: float | None = None,
    media: Media | None = None,
) -> ForwardFlops:
    """Forward operations of a micro-batch, by part; arguments as for `step_flops`."""
    text, vision_encoder, projector = spec.text_decoder, spec.vision_encoder, spec.vision_projector
    lengths = list(lengths)
    encoded = images if encoded is None else encoded
    attention = {
        "layers": text.num_layers,
        "windows": text.traits.windows,
        "heads": text.num_attention_heads,
        "head_size": text.kv_channels,
        "lengths": lengths,
        "causal": True,
    }
    scores = stack_score_flops(**attention)
    decoder = transformer_flops(
        **attention,
        hidden=text.hidden_size,
        groups=text.num_query_groups,
        ffn=text.ffn_hidden_size,
        gated=text.gated_linear_unit,
    )
    work, own = vision_encoder.encoder_work(encoded, media), vision_encoder
    products = (
        own.num_built_layers
        * work.positions
        * _layer_products(
            own.hidden_size,
            own.num_attention_heads,
            own.num_query_groups,
            own.kv_channels,
            own.ffn_hidden_size,
            own.gated_linear_unit,
        )
    )
    features = vision_encoder.encoder_work(images, media).features
    linears = [2.0 * work for work in projector.projector_work(images, features)]
    return ForwardFlops(
        patches=2.0 * work.patches * vision_encoder.patch_channels * vision_encoder.hidden_size,
        vision_encoder=products + 4.0 * own.num_attention_heads * own.kv_channels * work.pairs,
        projector=sum(linears),
        projector_first=linears[0],
        decoder=decoder,
        scores=scores,
        head=2.0 * supervised * text.hidden_size * text.language_vocab_size,
    )


def step_flops(
    spec,
    *,
    lengths: Iterable[float],
    images: float,
    supervised: float,
    encoded: float | None = None,
    media: Media | None = None,
) -> float:
    """Forward and backward operations of a micro-batch.

    Args:
        spec: ModelSpec; its freeze flags decide what the backward pass costs: nothing in a frozen vision encoder, no
            weight gradients in a frozen decoder behind a trained projector, nor where adapters are trained instead
            (whose own few operations are left out).
        lengths: real tokens of each sample, image positions included, padding not. Samples that share a packed row
            count each by itself: attention stays inside a sample.
        images: images, or tiles where images are cut into them.
        supervised: positions with a label (the head runs on these only).
        encoded: images that the vision encoder runs on; None: all. The features of the others come from a cache.
        media: the images themselves, for encoders whose work depends on their sizes.
    """
    forward = forward_flops(spec, lengths=lengths, images=images, supervised=supervised, encoded=encoded, media=media)
    vision_encoder = not spec.vision_encoder.freeze
    projector, decoder = not spec.vision_projector.freeze, not spec.text_decoder.freeze
    own = {kind: not part.freeze and part.lora is None for kind, part in spec.part_specs().items()}
    flow = vision_encoder or projector or decoder
    return (
        forward.patches * (1 + own["vision_encoder"])
        + forward.vision_encoder * (1 + vision_encoder + own["vision_encoder"])
        + forward.projector * (1 + (vision_encoder or projector) + own["vision_projector"])
        - forward.projector_first * (projector and not vision_encoder)
        + (forward.decoder - forward.scores + forward.head) * (1 + flow + own["text_decoder"])
        + forward.scores * (1 + 2 * flow)
    )
