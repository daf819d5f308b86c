"""Small agreements between ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def agree(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 alone; every rank gets its result, or its ValueError or OSError."""
    outcome: list = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome[0] = work()
        except (ValueError, OSError) as error:
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather(value: T) -> list[T]:
    """The value of every rank, in rank order, on every rank."""
    values: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
