"""Small agreements between ranks, over the whole world or a group of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.distributed import ProcessGroup

T = TypeVar("T")


def agree(work: Callable[[], T], group: ProcessGroup | None = None) -> T:
    """Run `work` on rank 0 alone; every rank gets its result, or its ValueError or OSError."""
    outcome: list = [None, None]
    if torch.distributed.get_rank() == 0:
        outcome = _outcome(work)
    torch.distributed.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather(value: T, group: ProcessGroup | None = None) -> list[T]:
    """The value of every rank, in rank order, on every rank."""
    values: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def everywhere(work: Callable[[], T], group: ProcessGroup | None = None) -> list[T]:
    """Run `work` on every rank; all results in rank order, or the first ValueError or OSError on all ranks alike."""
    outcomes = gather(_outcome(work), group)
    for _, error in outcomes:
        if error is not None:
            raise error
    return [value for value, _ in outcomes]


def _outcome(work: Callable[[], T]) -> list:
    """[result, None] or [None, error]."""
    try:
        return [work(), None]
    except (ValueError, OSError) as error:
        return [None, error]
