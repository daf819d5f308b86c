"""SigLIP vision encoder (Zhai et al. 2023) on megatron.core's parallel layers.

Legend: R images, P patches, H hidden size.
"""

from __future__ import annotations

import torch

from mindspeed_mm.models.kit.fixed_size_encoder import FixedSizeEncoder
from mindspeed_mm.models.media import Features, Media, fixed_size_features
from mindspeed_mm.models.runtime import Runtime


class SiglipVisionEncoder(FixedSizeEncoder):
    """Every feature is a patch."""

    def __init__(self, spec, runtime: Runtime) -> None:
        super().__init__(spec, runtime, patch_bias=True)
        torch.nn.init.zeros_(self.conv1.bias)

    def forward(self, media: Media) -> Features:
        """P features of each row of pixels [R, 3, image_size, image_size]."""
        return fixed_size_features(self.run_layers(self.patches(media) + self.position_embeddings.weight), media)
