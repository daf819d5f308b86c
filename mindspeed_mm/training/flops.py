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
    """The tower's patch embedding, whose input needs no gradient."""
    tower: float
    projector: float
    """All its linears."""
    projector_first: float
    """The first of them, whose input needs no gradient while the tower is frozen."""
    decoder: float
    """Layers, attention included."""
    scores: float
    """The attention in them: QK^T and the product with V."""
    head: float


def forward_flops(
    spec, *, lengths: Iterable[float], images: float, supervised: float, encoded: float | None = None
) -> ForwardFlops:
    """Forward operations of a micro-batch, by part; arguments as for `step_flops`."""
    text, tower, projector = spec.text_decoder, spec.vision_encoder, spec.vision_projector
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
    one_picture = transformer_flops(
        layers=tower.num_built_layers,
        hidden=tower.hidden_size,
        heads=tower.num_attention_heads,
        groups=tower.num_query_groups,
        head_size=tower.kv_channels,
        ffn=tower.ffn_hidden_size,
        gated=False,
        lengths=[tower.num_positions],
        causal=False,
    )
    patches = (tower.image_size // tower.patch_size) ** 2
    linears = [2.0 * images * tower.num_image_tokens * inputs * outputs for inputs, outputs in projector.sizes]
    return ForwardFlops(
        patches=2.0 * encoded * patches * 3 * tower.patch_size**2 * tower.hidden_size,
        tower=encoded * one_picture,
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
        spec: ModelSpec; its freeze flags decide what the backward pass costs: nothing in a frozen tower, no weight
            gradients in a frozen decoder behind a trained projector.
        lengths: real tokens of each sample, image positions included, padding not. Samples that share a packed row
            count each by itself: attention stays inside a sample.
        images: pictures.
        supervised: positions with a label (the head runs on these only).
        encoded: pictures that the tower runs on; None: all. The features of the others come from a cache.
    """
    forward = forward_flops(spec, lengths=lengths, images=images, supervised=supervised, encoded=encoded)
    tower = not spec.vision_encoder.freeze
    projector, decoder = not spec.vision_projector.freeze, not spec.text_decoder.freeze
    flow = tower or projector or decoder
    return (
        forward.patches * (1 + tower)
        + forward.tower * (3 if tower else 1)
        + forward.projector * (1 + (tower or projector) + projector)
        - forward.projector_first * (projector and not tower)
        + (forward.decoder - forward.scores + forward.head) * (1 + flow + decoder)
        + forward.scores * (1 + 2 * flow)
    )
