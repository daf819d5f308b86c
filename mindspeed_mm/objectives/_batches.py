"""Micro-batches on their way into the model: rows of one length, or one row without padding."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F

from mindspeed_mm.constants import IGNORE_INDEX
from mindspeed_mm.data.sample import Batch


def pad_to_one_length(batches: list[Batch], pad_token_id: int) -> list[Batch]:
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


def pack_rows(batch: Batch, config: Any) -> tuple[Batch, list[int] | None]:
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
