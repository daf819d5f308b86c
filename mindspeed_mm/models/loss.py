"""What the head says of the supervised positions. Legend: S sequence, B batch, V vocabulary, T tensor-parallel size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from torch.utils.checkpoint import checkpoint

from mindspeed_mm.constants import IGNORE_INDEX

CHUNK = 2048
"""Positions whose logits exist at a time: 0.26 GB in float32 for 32000 tokens."""

Head = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
"""TextDecoder of the last pipeline stage, hidden states and labels -> values of the supervised positions."""


def token_losses(decoder, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every supervised position, float32.

    The head runs on supervised positions only, so image, prompt and padding positions cost no logits. More than CHUNK
    of them go through it piece by piece, and again in the backward pass: their logits never exist all at once.

    Args:
        decoder: TextDecoder of the last pipeline stage.
        hidden: [S, B, H] of the final norm (a sequence slice under sequence parallelism).
        labels: [B, S] int64, the id each position predicts; IGNORE_INDEX where none; of the same slice as `hidden`
            under context parallelism. Best in host memory: what is supervised is then known without waiting for the
            device.

    Returns:
        [n] losses in the order of the supervised positions read column by column; n may be 0.
    """
    return _by_pieces(_losses, decoder, hidden, labels)


def token_log_probs(decoder, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probability of every supervised position's id and the mean of its logits over the vocabulary, float32.

    Args:
        decoder, hidden, labels: as for `token_losses`, in pieces likewise.

    Returns:
        [n, 2] in the order of the supervised positions read column by column; the mean has no gradient.
    """
    return _by_pieces(_log_probs, decoder, hidden, labels)


def supervised_places(labels: torch.Tensor) -> torch.Tensor:
    """Positions that predict something, [B, S] -> [n] int64 counted column by column, where the labels are."""
    return (labels.t().flatten() != IGNORE_INDEX).nonzero().squeeze(1)


def _by_pieces(measure: Head, decoder, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    supervised = supervised_places(labels)
    targets = labels.t().flatten()[supervised].to(hidden.device, non_blocking=True)
    hidden = decoder.picked(hidden, supervised)
    if len(targets) <= CHUNK:
        return measure(decoder, hidden, targets)
    pieces = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.cat([checkpoint(measure, decoder, *piece, use_reentrant=False) for piece in pieces])


def _losses(decoder, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[n, H] and [n] -> [n] float32"""
    logits = decoder.logits(hidden.unsqueeze(1)).float()
    return tensor_parallel.vocab_parallel_cross_entropy(logits, targets.unsqueeze(1)).squeeze(1)


def _log_probs(decoder, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[n, H] and [n] -> [n, 2] float32"""
    logits = decoder.logits(hidden.unsqueeze(1)).float()
    means = _mean_logits(decoder, logits.detach())  # first: the cross-entropy writes into its argument
    losses = tensor_parallel.vocab_parallel_cross_entropy(logits, targets.unsqueeze(1)).squeeze(1)
    return torch.stack((-losses, means), dim=1)


def _mean_logits(decoder, logits: torch.Tensor) -> torch.Tensor:
    """[n, 1, V_padded / T] of this rank -> [n], without the columns that only fill the vocabulary up."""
    first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
    sums = logits[..., : max(0, decoder.vocab_size - first)].sum(-1).squeeze(1)
    return tensor_parallel.reduce_from_tensor_model_parallel_region(sums) / decoder.vocab_size
