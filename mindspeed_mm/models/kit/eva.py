"""EVA-CLIP vision encoder (Sun et al. 2023) on megatron.core's parallel layers.

Legend: R images, P positions (a class token and the patches), H hidden size.
"""

from __future__ import annotations

import torch

from mindspeed_mm.models.kit.fixed_size_encoder import FixedSizeEncoder
from mindspeed_mm.models.media import Features, Media, fixed_size_features
from mindspeed_mm.models.runtime import Runtime


class EvaVisionEncoder(FixedSizeEncoder):
    """A class token before the patches, all layers, and every position as a feature."""

    def __init__(self, spec, runtime: Runtime) -> None:
        super().__init__(spec, runtime, patch_bias=True)
        self.class_token = torch.nn.Parameter(torch.empty(1, 1, spec.hidden_size))
        torch.nn.init.normal_(self.class_token, std=self.config.init_method_std)
        torch.nn.init.zeros_(self.conv1.bias)

    def forward(self, media: Media) -> Features:
        """P features of each row of pixels [R, 3, image_size, image_size]."""
        patches = self.patches(media)
        hidden = torch.cat((self.class_token.expand(patches.shape[0], -1, -1), patches), dim=1)
        return fixed_size_features(self.run_layers(hidden + self.position_embeddings.weight), media)
