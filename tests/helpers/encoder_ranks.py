"""A vision encoder alone on any number of tensor-parallel ranks: its features and gradients, in HF's names."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tests.helpers.tensor_ranks import start_rank


class EncoderShard(NamedTuple):
    """What one rank knows: the features [F, Hv], and the gradients of its tensors."""

    features: torch.Tensor
    gradients: dict[str, torch.Tensor]


def encode(path: str, chosen: dict, size: int, pixels: torch.Tensor, weights: torch.Tensor) -> EncoderShard:
    """Features of images, and gradients of the sum of features times `weights`.

    Args:
        path: folder of the encoder.
        chosen: select_layer and select_feature.
        size: tensor-parallel size; this process is one of the ranks.
        pixels: [R, 3, h, w].
        weights: [F, Hv].
    """
    rank = start_rank(size)
    from mindspeed_mm.models.describe import describe_part
    from mindspeed_mm.models.media import Media
    from mindspeed_mm.models.part import part_of
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.models.sources import open_source
    from mindspeed_mm.weights.loading import load_part

    source = open_source(path)
    spec = describe_part(source.part("vision_encoder"), **chosen)
    part = part_of("vision_encoder", spec)
    encoder = part.build(spec, Runtime(tensor_model_parallel_size=size))
    load_part(encoder, part, spec, source, tp_rank=rank, tp_size=size)
    features = encoder(Media.of_images(pixels))
    assert features.counts == (spec.num_image_tokens,) * len(pixels)
    (features.values * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    return EncoderShard(features.values.detach(), gradients)


def whole_gradients(shards: list[EncoderShard], part, spec) -> dict[str, torch.Tensor]:
    """Gradients of the whole encoder under HF's names."""
    from mindspeed_mm.weights.shards import unshard

    full = {}
    for step in part.rules["ours"].steps(spec.geometry):
        if not step.unused:
            full[step.target] = unshard([shard.gradients[step.target] for shard in shards], step.rule, spec.geometry)
    return part.rules["hf"].export(full, spec.geometry)
