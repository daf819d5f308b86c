"""Token losses of the supervised positions. Legend: S sequence, B batch, V vocabulary, T tensor-parallel size."""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel

from mindspeed_mm.constants import IGNORE_INDEX


def token_losses(decoder, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every supervised position, float32.

    The head runs on supervised positions only, so image, prompt and padding positions cost no logits.

    Args:
        decoder: LlamaDecoder of the last pipeline stage.
        hidden: [S, B, H] of the final norm (a sequence slice under sequence parallelism).
        labels: [B, S] int64, the id each position predicts; IGNORE_INDEX where none; of the same slice as `hidden`
            under context parallelism.

    Returns:
        [n] losses in the order of the supervised positions read column by column; n may be 0.
    """
    targets = labels.t()
    supervised = targets != IGNORE_INDEX
    logits = decoder.logits(decoder.gather_sequence(hidden)[supervised].unsqueeze(1))
    losses = tensor_parallel.vocab_parallel_cross_entropy(logits.float(), targets[supervised].unsqueeze(1))
    return losses.squeeze(1)
