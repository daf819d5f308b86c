"""What vision transformers on images of one size share: patches, positions, layers, and an image of zeros.

Legend: R images, P patches, H hidden size, Hv width of a feature.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock

from mindspeed_mm.models.kit.shown_states import ShownStates
from mindspeed_mm.models.kit.specs import LayerOptions, block_spec
from mindspeed_mm.models.media import Features, Media, fixed_size_features
from mindspeed_mm.models.runtime import Runtime, encoder_config


class FixedSizeEncoder(MegatronModule):
    """Patch embedding, position embedding and the layers up to the last selected one; layers behind it and the final
    norm are never built."""

    def __init__(self, spec, runtime: Runtime, *, patch_bias: bool) -> None:
        """`patch_bias`: whether the patch embedding has a bias."""
        config = encoder_config(spec, runtime, num_layers=spec.num_built_layers)
        super().__init__(config=config)
        self.spec = spec
        self.conv1 = torch.nn.Conv2d(
            3, spec.hidden_size, kernel_size=spec.patch_size, stride=spec.patch_size, bias=patch_bias
        )
        self.position_embeddings = torch.nn.Embedding(spec.num_positions, spec.hidden_size)
        last, self.shown = spec.num_built_layers, sorted(set(spec.feature_layers))
        several = len(self.shown) > 1
        layers = [
            LayerOptions(shows=ShownStates(number in self.shown, number == last) if several else None)
            for number in range(1, last + 1)
        ]
        self.decoder = TransformerBlock(
            config=config,
            spec=block_spec(layers, causal=False),
            pre_process=True,
            post_process=True,
            post_layer_norm=False,
        )
        for parameter in (self.conv1.weight, self.position_embeddings.weight):
            torch.nn.init.normal_(parameter, std=config.init_method_std)

    def patches(self, media: Media) -> torch.Tensor:
        """Pixels [R, 3, image_size, image_size] -> [R, P, H]"""
        return self.conv1(media.pixels.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)

    def run_layers(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, positions, H] -> [R, positions, Hv], the hidden states behind the selected layers side by side."""
        hidden = hidden.transpose(0, 1).contiguous()
        first = {"context": hidden} if 0 in self.shown else {}
        found = self.decoder(hidden_states=hidden, attention_mask=None, **first).transpose(0, 1)
        wanted = list(self.spec.feature_layers)
        if wanted == self.shown:
            return found
        states = dict(zip(self.shown, found.chunk(len(self.shown), dim=-1), strict=True))
        return torch.cat([states[layer] for layer in wanted], dim=-1)

    def blank(self) -> Media:
        """One image of zeros."""
        side = self.spec.image_size
        return Media.of_images(self.conv1.weight.new_zeros(1, 3, side, side))

    def blank_features(self) -> Features:
        """The features of `blank`, zeros."""
        zeros = self.conv1.weight.new_zeros(1, self.spec.num_image_tokens, self.spec.feature_size)
        return fixed_size_features(zeros, self.blank())

    def set_input_tensor(self, input_tensor: torch.Tensor | None) -> None:
        """The encoder lives on the first pipeline stage and never receives hidden states."""
