"""CLIP vision encoder (Radford et al. 2021) on megatron.core's parallel layers.

Legend: R images, P patches, H hidden size.
"""

from __future__ import annotations

import torch

from mindspeed_mm.models.kit.fixed_size_encoder import FixedSizeEncoder
from mindspeed_mm.models.media import Features, Media, fixed_size_features
from mindspeed_mm.models.runtime import Runtime


class CLIPVisionEncoder(FixedSizeEncoder):
    """A class token before the patches, and a norm before the layers. LLaVA takes the output of the last layer but
    one."""

    def __init__(self, spec, runtime: Runtime) -> None:
        super().__init__(spec, runtime, patch_bias=False)
        self.class_token = torch.nn.Parameter(torch.empty(1, 1, spec.hidden_size))
        self.ln_pre = torch.nn.LayerNorm(spec.hidden_size, eps=spec.layernorm_epsilon)
        torch.nn.init.normal_(self.class_token, std=self.config.init_method_std)

    def forward(self, media: Media) -> Features:
        """P features of each row of pixels [R, 3, image_size, image_size] (P + 1 with select_feature "cls_patch")."""
        patches = self.patches(media)
        class_token = self.class_token.expand(patches.shape[0], -1, -1)
        hidden = torch.cat((class_token, patches), dim=1) + self.position_embeddings.weight
        features = self.run_layers(self.ln_pre(hidden))
        return fixed_size_features(features if self.spec.select_feature == "cls_patch" else features[:, 1:], media)
