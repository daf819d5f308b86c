"""Batch -> device -> model -> summed loss, in the form that megatron.core's schedules ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from mindspeed_mm.constants import IGNORE_INDEX
from mindspeed_mm.data.sample import Batch
from mindspeed_mm.models.media import Features
from mindspeed_mm.platform import current_platform
from mindspeed_mm.platform.segments import Segments

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
    count = torch.full((), token_losses.numel(), dtype=torch.int, device=token_losses.device)  # torch.tensor waits
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
    positions = torch.arange(extra).expand(*batch.position_ids.shape[:-1], -1)
    fills = {"input_ids": pad_token_id, "labels": IGNORE_INDEX}
    if batch.segment_ids is not None:
        fills["segment_ids"] = 0
    changes = {name: F.pad(getattr(batch, name), (0, extra), value=value) for name, value in fills.items()}
    return dataclasses.replace(batch, **changes, position_ids=torch.cat((batch.position_ids, positions), dim=-1))


def one_row(batch: Batch, config: Any) -> tuple[Batch, list[int] | None]:
    """All rows of a micro-batch one behind the other, without their padding, so that none of it is computed.

    Virtual pipeline stages want micro-batches of one length and keep the padding. A batch that does not say how long
    its rows are stays as it is, and so does one without padding, whose rows attention takes at once.

    Args:
        config: the model's TransformerConfig.

    Returns:
        The batch with rows [1, T], and the lengths of its sequences, whose sum is T; or the batch as it was, and None.
    """
    fixed = config.virtual_pipeline_model_parallel_size is not None
    multiple = 1 if fixed else config.context_parallel_size
    multiple *= config.tensor_model_parallel_size if config.sequence_parallel and not fixed else 1
    real = None if (fixed or _is_full(batch, multiple)) and batch.segment_ids is None else _real_positions(batch)
    if real is None:
        return batch, None
    if fixed:
        real = torch.ones_like(real)
    lengths = _sequence_lengths(batch, real)
    surplus = -sum(lengths) % multiple
    positions = batch.position_ids[..., real]
    rows = {
        "input_ids": F.pad(batch.input_ids[real], (0, surplus)),
        "labels": F.pad(batch.labels[real], (0, surplus), value=IGNORE_INDEX),
        "position_ids": torch.cat((positions, torch.arange(surplus).expand(*positions.shape[:-1], -1)), dim=-1),
    }
    row = dataclasses.replace(batch, segment_ids=None, **{name: x.unsqueeze(-2) for name, x in rows.items()})
    return row, [*lengths, surplus] if surplus else lengths


def _sequence_lengths(batch: Batch, real: torch.Tensor) -> list[int]:
    """Lengths of the sequences behind each other at the real positions: samples, and padding of a row that is kept."""
    if batch.segment_ids is None:
        return list(batch.lengths)
    first = batch.segment_ids.shape[1] + 1  # more than a row has segments
    numbers = batch.segment_ids + first * torch.arange(len(batch.segment_ids))[:, None]
    return torch.unique_consecutive(numbers[real], return_counts=True)[1].tolist()


def _is_full(batch: Batch, multiple: int) -> bool:
    """Whether every row is one sequence without padding, which `multiple` ranks can share."""
    rows, length = batch.input_ids.shape
    return list(batch.lengths) == [length] * rows and length % multiple == 0


def _real_positions(batch: Batch) -> torch.Tensor | None:
    """[B, S] bool, True where a sample stands; None where the batch does not say."""
    if batch.segment_ids is not None:
        real = batch.segment_ids > 0
    elif len(batch.lengths) == len(batch.input_ids):
        real = torch.arange(batch.input_ids.shape[1]) < torch.tensor(batch.lengths)[:, None]
    else:
        return None
    return real if real.any() else None


def forward_step(data_iterator: Iterator, model: torch.nn.Module) -> tuple[torch.Tensor, LossFunction]:
    """One micro-batch through the model (megatron.core's forward_step_func).

    Args:
        data_iterator: yields data.sample.Batch.
        model: VLM, possibly wrapped.
    """
    return forward_batch(next(data_iterator), model)


def forward_batch(
    batch: Batch, model: torch.nn.Module, features: Features | None = None
) -> tuple[torch.Tensor, LossFunction]:
    """`forward_step` of a given micro-batch; `features` of its images stand in for the vision encoder.

    Ids and labels stay in host memory, where the model looks for images and labels without waiting for the device.
    """
    device = current_platform().device()
    batch, lengths = one_row(batch, model.config)
    output = model(
        batch.input_ids,
        batch.position_ids.to(device, non_blocking=True),
        labels=batch.labels,
        media=None if batch.media is None else batch.media.to(device),
        segments=None if lengths is None else Segments.of_lengths(lengths, device),
        image_features=features,
    )
    return output, sum_losses
