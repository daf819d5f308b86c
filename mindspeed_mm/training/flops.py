"""Floating-point operations of a training step, counted from the model's shapes.

A multiply-add counts as two. Matrix products and attention are counted, norms, activations and softmax are not
(the usual model-FLOP convention of PaLM, appendix B, and Megatron-LM). Recomputation is not counted. Causal attention
counts half the square. The backward pass costs one forward pass where gradients flow through a part and another one
where its weights are trained.
"""

from __future__ import annotations

from collections.abc import Iterable


def transformer_flops(
    *,
    layers: int,
    hidden: int,
    heads: int,
    groups: int,
    head_size: int,
    ffn: int,
    gated: bool,
    lengths: Iterable[int],
    causal: bool,
) -> float:
    """Forward operations of a stack of transformer layers over sequences of the given lengths."""
    lengths = list(lengths)
    attention_weights = hidden * head_size * (heads + 2 * groups) + heads * head_size * hidden
    mlp_weights = hidden * ffn * (3 if gated else 2)
    products = 2.0 * sum(lengths) * (attention_weights + mlp_weights)
    scores = 4.0 * heads * head_size * sum(length * length for length in lengths) * (0.5 if causal else 1.0)
    return layers * (products + scores)


def step_flops(spec, *, lengths: Iterable[int], images: int, supervised: int) -> float:
    """Forward and backward operations of a micro-batch.

    Args:
        spec: ModelSpec; its freeze flags decide what the backward pass costs.
        lengths: real tokens of each row, image positions included, padding not.
        images: pictures.
        supervised: positions with a label (the head runs on these only).
    """
    text, tower, projector = spec.text_decoder, spec.vision_encoder, spec.vision_projector
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
    head = 2.0 * supervised * text.hidden_size * text.language_vocab_size
    vision = transformer_flops(
        layers=tower.num_built_layers,
        hidden=tower.hidden_size,
        heads=tower.num_attention_heads,
        groups=tower.num_query_groups,
        head_size=tower.kv_channels,
        ffn=tower.ffn_hidden_size,
        gated=False,
        lengths=[tower.num_positions] * images,
        causal=False,
    )
    patches = (tower.image_size // tower.patch_size) ** 2
    vision += 2.0 * images * patches * 3 * tower.patch_size**2 * tower.hidden_size
    projection_weights = sum(inputs * outputs for inputs, outputs in projector.sizes)
    projection = 2.0 * images * tower.num_image_tokens * projection_weights
    trained = {"tower": not tower.freeze, "projector": not projector.freeze, "decoder": not text.freeze}
    through_projector = trained["tower"] or trained["projector"]
    return (
        vision * (3 if trained["tower"] else 1)
        + projection * (1 + trained["tower"] + trained["projector"])
        + (decoder + head) * (1 + (through_projector or trained["decoder"]) + trained["decoder"])
    )
