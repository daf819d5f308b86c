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

from mindspeed_mm.data.sample import Batch
from mindspeed_mm.models.operations import EncoderWork
from mindspeed_mm.models.trainable import trained_linears


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
    cross: float = 0.0
    """The linears of cross-attention to features beside the text, and its MLPs."""
    cross_scores: float = 0.0
    """The attention in it."""
    interaction: float = 0.0
    """What stands in front of the head."""


def forward_flops(
    spec, *, lengths: Iterable[float], work: EncoderWork, supervised: float, projected: EncoderWork | None = None
) -> ForwardFlops:
    """Forward operations of a micro-batch, by part.

    Args:
        work: of the vision encoder.
        projected: of the projector; None: the same.
        spec, lengths, supervised: as for `step_flops`.
    """
    text, vision_encoder = spec.text_decoder, spec.vision_encoder
    lengths, layer = list(lengths), text.layer
    tokens = sum(lengths)
    scores = stack_score_flops(
        layers=text.num_layers,
        windows=text.traits.windows,
        heads=layer.num_attention_heads,
        head_size=layer.kv_channels,
        lengths=lengths,
        causal=True,
    )
    # The last MLP runs where the head asks (kit/asked_rows.py).
    unasked = 0.0 if not spec.asks_early or not supervised else tokens - supervised
    own = vision_encoder.layer
    encoder = 2.0 * vision_encoder.num_built_layers * work.positions * own.weights
    products = spec.vision_projector.products(work if projected is None else projected)
    linears = [2.0 * product.rows * product.inputs * product.outputs for product in products]
    cross, cross_scores = _cross_flops(spec, tokens, work if projected is None else projected)
    return ForwardFlops(
        cross=cross,
        cross_scores=cross_scores,
        patches=2.0 * work.patches * vision_encoder.patch_channels * vision_encoder.hidden_size,
        vision_encoder=encoder + 4.0 * own.num_attention_heads * own.kv_channels * work.pairs,
        projector=sum(linears),
        projector_first=0.0 if products[0].behind_weights else linears[0],
        decoder=2.0 * (text.num_layers * tokens * layer.weights - unasked * layer.mlp_weights) + scores,
        scores=scores,
        head=2.0 * supervised * text.hidden_size * text.language_vocab_size,
        interaction=_interaction_flops(spec, supervised, work, lengths),
    )


def _cross_flops(spec, tokens: float, work: EncoderWork) -> tuple[float, float]:
    """(linears, attention) of a decoder's cross-attention. A row has all its images beside it, at least a blank one."""
    shape = spec.text_decoder.cross_shape
    if shape is None:
        return 0.0, 0.0
    features = max(work.items, 1.0) * spec.vision_projector.num_latents
    linears = 2.0 * shape.blocks * (tokens * shape.tokens + features * shape.features)
    return linears, 4.0 * shape.blocks * shape.heads * shape.head_size * tokens * features


def _interaction_flops(spec, supervised: float, work: EncoderWork, lengths: Sequence[float]) -> float:
    if spec.interaction is None:
        return 0.0
    products = spec.interaction.head_products(supervised, work.features, lengths)
    return sum(2.0 * product.rows * product.inputs * product.outputs for product in products)


def step_flops(
    spec,
    *,
    lengths: Iterable[float],
    work: EncoderWork,
    supervised: float,
    projected: EncoderWork | None = None,
) -> float:
    """Forward and backward operations of a micro-batch.

    Args:
        spec: ModelSpec; its freeze flags decide what the backward pass costs: nothing in a frozen vision encoder, no
            weight gradients in a frozen decoder behind a trained projector, nor where adapters are trained instead
            (whose own few operations are left out).
        lengths: real tokens of each sample, image positions included, padding not. Samples that share a packed row
            count each by itself: attention stays inside a sample.
        work: the vision encoder's; none where its features come from a cache.
        supervised: positions with a label (the head runs on these only).
        projected: the projector's work; None: the same as the encoder's.
    """
    forward = forward_flops(spec, lengths=lengths, work=work, supervised=supervised, projected=projected)
    vision_encoder = spec.vision_encoder.trains
    projector, decoder = spec.vision_projector.trains, spec.text_decoder.trains
    own = {kind: part.trains and part.lora is None for kind, part in spec.part_specs().items()}
    linears = trained_linears(spec.parts()["text_decoder"], spec.text_decoder)
    flow = vision_encoder or projector or decoder
    block = own.get("interaction", False)
    return (
        forward.patches * (1 + own["vision_encoder"])
        + forward.vision_encoder * (1 + vision_encoder + own["vision_encoder"])
        + forward.projector * (1 + (vision_encoder or projector) + own["vision_projector"])
        - forward.projector_first * (projector and not vision_encoder)
        + (forward.decoder - forward.scores) * (1 + flow + linears.layers)
        + forward.cross * (1 + flow + linears.cross)
        + forward.interaction * (1 + (flow or block) + block)
        + forward.head * (1 + (flow or block) + linears.head)
        + (forward.scores + forward.cross_scores) * (1 + 2 * flow)
    )


def batch_flops(spec, batch: Batch) -> float:
    """Forward and backward operations of a collated micro-batch."""
    media = batch.media
    work = EncoderWork() if media is None else spec.vision_encoder.encoder_work(sum(media.rows), media.grid.tolist())
    # Features that a cache holds are those of images of one size.
    projected = work if batch.cached is None else spec.family.planned_image(spec).times(batch.num_images)
    return step_flops(spec, lengths=batch.lengths, work=work, supervised=batch.supervised, projected=projected)
