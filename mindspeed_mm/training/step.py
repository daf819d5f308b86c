"""Batch -> device -> model -> summed loss, in the form that megatron.core's schedules ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from mindspeed_mm.constants import IGNORE_INDEX
from mindspeed_mm.data.sample import Batch
from mindspeed_mm.models.masks import segment_mask
from mindspeed_mm.platform import current_platform

LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]]


def sum_losses(token_losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Sum and number of the token losses of a micro-batch.

    The driver divides once, by the supervised tokens of the whole global batch, so that the loss does not depend on
    how the batch is split into micro-batches and ranks.

    Args:
        token_losses: [n] float32 of the supervised positions; n may be 0.

    Returns:
        (loss sum with graph, n as an int tensor, {"lm loss": (detached sum, n)}).
    """
    total = token_losses.sum()
    count = torch.tensor(token_losses.numel(), dtype=torch.int, device=token_losses.device)
    return total, count, {"lm loss": (total.detach(), count)}


def level(batches: list[Batch], pad_token_id: int) -> list[Batch]:
    """Pad the rows of a step's micro-batches to one length, which virtual pipeline stages ask for.

    What is added stands behind everything else, is seen by no other position and has no label.
    """
    longest = max(batch.input_ids.shape[1] for batch in batches)
    return [_lengthen(batch, longest - batch.input_ids.shape[1], pad_token_id) for batch in batches]


def _lengthen(batch: Batch, extra: int, pad_token_id: int) -> Batch:
    if extra == 0:
        return batch
    positions = torch.arange(extra).expand(batch.position_ids.shape[0], -1)
    fills = {"input_ids": pad_token_id, "labels": IGNORE_INDEX}
    if batch.segment_ids is not None:
        fills["segment_ids"] = 0
    changes = {name: F.pad(getattr(batch, name), (0, extra), value=value) for name, value in fills.items()}
    return dataclasses.replace(batch, **changes, position_ids=torch.cat((batch.position_ids, positions), dim=1))


def forward_step(data_iterator: Iterator, model: torch.nn.Module) -> tuple[torch.Tensor, LossFunction]:
    """One micro-batch through the model (megatron.core's forward_step_func).

    Args:
        data_iterator: yields data.sample.Batch.
        model: VLM, possibly wrapped.
    """
    batch = next(data_iterator)
    device = current_platform().device()
    mask = None
    if batch.segment_ids is not None:
        mask = segment_mask(batch.segment_ids.to(device, non_blocking=True))
    output = model(
        batch.input_ids.to(device, non_blocking=True),
        batch.position_ids.to(device, non_blocking=True),
        labels=batch.labels.to(device, non_blocking=True),
        pixel_values=batch.pixel_values.to(device, non_blocking=True),
        attention_mask=mask,
    )
    return output, sum_losses
