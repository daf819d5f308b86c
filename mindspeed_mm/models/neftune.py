"""Noise on word embeddings while a model is fine-tuned (NEFTune, Jain et al. 2023)."""

from __future__ import annotations

import math

import torch

from mindspeed_mm.platform.segments import Segments


def with_noise(embeddings: torch.Tensor, alpha: float, segments: Segments | None) -> torch.Tensor:
    """Embeddings [S, B, H] plus uniform noise within alpha / sqrt(L H); L is the length of a row, with its padding, or
    of each packed sequence. Every tensor-parallel rank draws the same."""
    length, _, width = embeddings.shape
    noise = torch.empty_like(embeddings).uniform_(-1, 1)
    if segments is None:
        return embeddings + noise * (alpha / math.sqrt(length * width))
    scales = [alpha / math.sqrt(length * width) for length in segments.lengths]
    factor = torch.tensor(scales).repeat_interleave(torch.tensor(segments.lengths)).to(embeddings)
    return embeddings + noise * factor[:, None, None]
