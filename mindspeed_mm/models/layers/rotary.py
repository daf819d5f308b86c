"""Rotary position embedding (RoPE, Su et al. 2021) with the scalings of Hugging Face's Llama configs.

Legend: B batch, S sequence, D head size.
"""

from __future__ import annotations

import math

import torch


def inverse_frequencies(head_size: int, base: float, scaling: dict | None) -> torch.Tensor:
    """Rotation speed of each pair of channels.

    Args:
        head_size: D, even.
        base: rope_theta.
        scaling: the config's rope_scaling, or None; rope_type "linear" (positions
            divided by `factor`) and "llama3" (Llama 3.1: long wavelengths are slowed down by `factor`, with a smooth
            transition between `low_freq_factor` and `high_freq_factor`).

    Returns:
        [D/2] float32.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size
    frequencies = 1.0 / base**exponents
    if scaling is None:
        return frequencies
    kind = scaling["rope_type"]
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "llama3":
        return _llama3_frequencies(frequencies, scaling)
    raise ValueError(f"rope_scaling type {kind!r} is not supported: expected linear or llama3")


def _llama3_frequencies(frequencies: torch.Tensor, scaling: dict) -> torch.Tensor:
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original_length = scaling["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    smooth = ((original_length / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / scaling["factor"] + smooth * frequencies


class RotaryEmbedding:
    """Cosines and sines of explicit positions. No parameters, no buffers: casting a model never rounds it."""

    def __init__(self, head_size: int, base: float, scaling: dict | None) -> None:
        self._frequencies = inverse_frequencies(head_size, base, scaling)

    def cos_sin(self, position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What `Platform.rotate_qk` rotates by, computed once for all layers.

        Args:
            position_ids: [B, S] int64; B may be 1 where all rows have the same positions.

        Returns:
            [2, S, B, 1, 1, D / 2]: cosines and sines, computed in float32 and cast to `dtype`.
        """
        angles = position_ids.t().float()[:, :, None, None, None] * self._frequencies_on(position_ids.device)
        return torch.stack((angles.cos(), angles.sin())).to(dtype)

    def _frequencies_on(self, device: torch.device) -> torch.Tensor:
        if self._frequencies.device != device:
            self._frequencies = self._frequencies.to(device)
        return self._frequencies
