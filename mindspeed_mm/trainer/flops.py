"""Floating-point operations of a training step, counted from the model's shapes.

A multiply-add counts as two. Matrix products and attention are counted, norms, activations and softmax are not
(the usual model-FLOP convention of PaLM, appendix B, and Megatron-LM). Recomputation is not counted. Causal attention
counts half the square. The backward pass costs one forward pass where gradients flow through a part and another one
where its weights are trained; attention itself, which has no weights, costs two wherever gradients flow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


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
) -> float:
    """Forward operations of a stack of transformer layers over sequences of the given lengths."""
    lengths = list(lengths)
    attention_weights = hidden * head_size * (heads + 2 * groups) + heads * head_size * hidden
    mlp_weights = hidden * ffn * (3 if gated else 2)
    products = 2.0 * sum(lengths) * (attention_weights + mlp_weights)
    return layers * (products + score_flops(heads=heads, head_size=head_size, lengths=lengths, causal=causal))


def score_flops(*, heads: int, head_size: int, lengths: Iterable[float], causal: bool) -> float:
    """Forward operations of one layer's attention itself: QK^T and the product with V."""
    return 4.0 * heads * head_size * sum(length * length for length in lengths) * (0.5 if causal else 1.0)


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
    spec, *, lengths: Iterable[float], images: float, supervised: float, encoded: float | None = None
) -> ForwardFlops:
    """Forward operations of a micro-batch, by part; arguments as for `step_flops`."""
    text, vision_encoder, projector = spec.text_decoder, spec.vision_encoder, spec.vision_projector
    lengths = list(lengths)
    encoded = images if encoded is None else encoded
    scores = score_flops(heads=text.num_attention_heads, head_size=text.kv_channels, lengths=lengths, causal=True)
    decoder = transformer_flops(
        layers=text.num_layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        groups=text.num_query_groups,
        head_size=text.kv_channels,
        ffn=text.ffn_hidden_size,
        gated=True,
        lengths=lengths,
        causal=True,
    )
    one_image = transformer_flops(
        layers=vision_encoder.num_built_layers,
        hidden=vision_encoder.hidden_size,
        heads=vision_encoder.num_attention_heads,
        groups=vision_encoder.num_query_groups,
        head_size=vision_encoder.kv_channels,
        ffn=vision_encoder.ffn_hidden_size,
        gated=False,
        lengths=[vision_encoder.num_positions],
        causal=False,
    )
    patches = (vision_encoder.image_size // vision_encoder.patch_size) ** 2
    linears = [2.0 * images * vision_encoder.num_image_tokens * inputs * outputs for inputs, outputs in projector.sizes]
    return ForwardFlops(
        patches=2.0 * encoded * patches * 3 * vision_encoder.patch_size**2 * vision_encoder.hidden_size,
        vision_encoder=encoded * one_image,
        projector=sum(linears),
        projector_first=linears[0],
        decoder=decoder,
        scores=text.num_layers * scores,
        head=2.0 * supervised * text.hidden_size * text.language_vocab_size,
    )


def step_flops(
    spec, *, lengths: Iterable[float], images: float, supervised: float, encoded: float | None = None
) -> float:
    """Forward and backward operations of a micro-batch.

    Args:
        spec: ModelSpec; its freeze flags decide what the backward pass costs: nothing in a frozen vision encoder, no
            weight gradients in a frozen decoder behind a trained projector.
        lengths: real tokens of each sample, image positions included, padding not. Samples that share a packed row
            count each by itself: attention stays inside a sample.
        images: images.
        supervised: positions with a label (the head runs on these only).
        encoded: images that the vision encoder runs on; None: all. The features of the others come from a cache.
    """
    forward = forward_flops(spec, lengths=lengths, images=images, supervised=supervised, encoded=encoded)
    vision_encoder = not spec.vision_encoder.freeze
    projector, decoder = not spec.vision_projector.freeze, not spec.text_decoder.freeze
    flow = vision_encoder or projector or decoder
    return (
        forward.patches * (1 + vision_encoder)
        + forward.vision_encoder * (3 if vision_encoder else 1)
        + forward.projector * (1 + (vision_encoder or projector) + projector)
        - forward.projector_first * (projector and not vision_encoder)
        + (forward.decoder - forward.scores + forward.head) * (1 + flow + decoder)
        + forward.scores * (1 + 2 * flow)
    )
