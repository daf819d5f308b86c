"""Supervised fine-tuning and pretraining: cross-entropy of the supervised tokens."""

from __future__ import annotations

import torch

from mindspeed_mm.data.sample import Batch
from mindspeed_mm.models.media import Features
from mindspeed_mm.objectives import LossFunction, Objective
from mindspeed_mm.objectives._batches import pack_rows
from mindspeed_mm.platform import current_platform
from mindspeed_mm.platform.segments import Segments


def sum_losses(token_losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Sum and number of the token losses of a micro-batch.

    Args:
        token_losses: [n] float32 of the supervised positions; n may be 0.

    Returns:
        (loss sum with graph, n as an int tensor, {"lm loss": (detached sum, n)}).
    """
    total = token_losses.sum()
    count = torch.full((), token_losses.numel(), dtype=torch.int, device=token_losses.device)  # torch.tensor waits
    return total, count, {"lm loss": (total.detach(), count)}


class Sft(Objective):
    """The mean of the token losses over the supervised tokens of the global batch."""

    name = "sft"

    def forward(
        self, batch: Batch, model: torch.nn.Module, features: Features | None = None
    ) -> tuple[torch.Tensor, LossFunction]:
        device = current_platform().device()
        batch, lengths = pack_rows(batch, model.config)
        output = model(
            batch.input_ids,
            batch.position_ids.to(device, non_blocking=True),
            labels=batch.labels,
            media=None if batch.media is None else batch.media.to(device),
            segments=None if lengths is None else Segments.of_lengths(lengths, device),
            image_features=features,
        )
        return output, sum_losses


OBJECTIVE = Sft()
