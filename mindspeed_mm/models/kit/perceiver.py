"""Flamingo's resampler on megatron.core's parallel linears: each tensor-parallel rank has a share of the heads.

Legend: I items (images or videos), R frames of an item, P features of a frame, L latents, W width of the encoder.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule

from mindspeed_mm.errors import DataError
from mindspeed_mm.models.kit.layer_list import LayerList
from mindspeed_mm.models.media import Features
from mindspeed_mm.models.runtime import Runtime, encoder_config
from mindspeed_mm.platform import current_platform


class PerceiverResampler(MegatronModule):
    """Learned latents that attend to all features of an item and to one another."""

    def __init__(self, spec, runtime: Runtime) -> None:
        config = encoder_config(spec, runtime)
        super().__init__(config=config)
        self.spec = spec
        self.latents = torch.nn.Parameter(torch.randn(spec.num_latents, spec.hidden_size))
        if spec.max_frames is not None:
            self.frame_embeddings = torch.nn.Parameter(torch.randn(spec.max_frames, spec.hidden_size))
        self.encoder = LayerList(config, (PerceiverLayer(config) for _ in range(config.num_layers)))
        self.final_norm = torch.nn.LayerNorm(spec.hidden_size, eps=spec.layernorm_epsilon)

    def forward(self, features: Features) -> Features:
        """[sum of R * P, W] -> [I * L, W]: an item has L features behind it, however many frames it has.

        Raises DataError for a video of more frames than there are embeddings of frames.
        """
        outputs = []
        if len(set(features.media.rows)) == 1:
            frames = features.media.rows[0]
            outputs.append(self._resample(features.values.unflatten(0, (len(features.counts), -1)), frames))
        else:
            pieces = features.values.split(features.counts)
            outputs += [self._resample(x[None], rows) for x, rows in zip(pieces, features.media.rows, strict=True)]
        counts = (self.spec.num_latents,) * len(features.counts)
        return Features(torch.cat(outputs).flatten(0, 1), counts, features.media)

    def _resample(self, memory: torch.Tensor, frames: int) -> torch.Tensor:
        """Items of equally many frames, [I, R * P, W] -> [I, L, W]."""
        limit = self.spec.max_frames
        if limit is not None:
            if frames > limit:
                raise DataError(
                    f"found a video of {frames} frames; the perceiver has embeddings for {limit}. Take fewer frames"
                )
            places = self.frame_embeddings[:frames].repeat_interleave(memory.shape[1] // frames, dim=0)
            memory = memory + places
        latents = self.encoder(self.latents.expand(memory.shape[0], -1, -1), memory)
        return self.final_norm(latents)


class PerceiverLayer(MegatronModule):
    """Attention and MLP, each added to its input."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.attention = PerceiverAttention(config)
        self.mlp = UnbiasedMLP(config)

    def forward(self, latents: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """[I, L, W], [I, K, W] -> [I, L, W]"""
        latents = latents + self.attention(latents, memory)
        return latents + self.mlp(latents)


class PerceiverAttention(MegatronModule):
    """Latents ask; the features and the latents, each behind a norm of its own, answer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        width, size = config.hidden_size, config.kv_channels * config.num_attention_heads
        self.media_norm = torch.nn.LayerNorm(width, eps=config.layernorm_epsilon)
        self.latent_norm = torch.nn.LayerNorm(width, eps=config.layernorm_epsilon)
        self.linear_q = unbiased_column(config, width, size)
        self.linear_kv = keys_and_values(config, width, size)
        self.linear_proj = unbiased_row(config, size, width)
        self.platform = current_platform()

    def forward(self, latents: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """[I, L, W], [I, K, W] -> [I, L, W]"""
        channels, latents = self.config.kv_channels, self.latent_norm(latents)
        memory = torch.cat((self.media_norm(memory), latents), dim=1)
        query, (key, value) = self.linear_q(latents)[0], self.linear_kv(memory)[0].chunk(2, dim=-1)
        heads = (x.unflatten(-1, (-1, channels)).transpose(1, 2) for x in (query, key, value))
        output = self.platform.attention(*heads, mask=None, causal=False, scale=channels**-0.5, dropout=0.0)
        return self.linear_proj(output.transpose(1, 2).flatten(2))[0]


class UnbiasedMLP(MegatronModule):
    """Norm, linear, GELU, linear; the linears have no biases."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.norm = torch.nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.linear_fc1 = unbiased_column(config, config.hidden_size, config.ffn_hidden_size)
        self.linear_fc2 = unbiased_row(config, config.ffn_hidden_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., W] -> [..., W]"""
        return self.linear_fc2(self.config.activation_func(self.linear_fc1(self.norm(hidden))[0]))[0]


def unbiased_column(config: TransformerConfig, inputs: int, outputs: int) -> ColumnParallelLinear:
    """A linear without bias whose outputs the tensor-parallel ranks share."""
    options = {"config": config, "init_method": config.init_method, "bias": False, "skip_bias_add": False}
    return ColumnParallelLinear(inputs, outputs, gather_output=False, **options)


class PairedLinear(ColumnParallelLinear):
    """Keys and values in one: a rank has its share of the keys, then its share of the values."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata=None):
        """Both halves by themselves, so that checkpoints hold all keys before all values at every split."""
        tensors, name = super().sharded_state_dict(prefix, sharded_offsets, metadata), f"{prefix}weight"
        return tensors | {name: apply_swiglu_sharded_factory(tensors[name], sharded_offsets)}


def keys_and_values(config: TransformerConfig, inputs: int, outputs: int) -> PairedLinear:
    """A linear without bias that gives `outputs` keys and as many values, shared out over the ranks."""
    options = {"config": config, "init_method": config.init_method, "bias": False, "skip_bias_add": False}
    return PairedLinear(inputs, 2 * outputs, gather_output=False, **options)


def unbiased_row(config: TransformerConfig, inputs: int, outputs: int) -> RowParallelLinear:
    """A linear without bias whose inputs the tensor-parallel ranks share."""
    options = {"config": config, "init_method": config.output_layer_init_method, "bias": False, "skip_bias_add": False}
    return RowParallelLinear(inputs, outputs, input_is_parallel=True, **options)
