"""Work on all records of a file by all cores, results in order."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

CHUNK = 256
"""Records that a process takes at a time."""

ALONE_BELOW = 2048
"""So few cheap records are not worth a process."""

MAX_PROCESSES = 16

_work: Callable[[range], object] | None = None
"""Set before worker processes are forked, which inherit it."""


def available_cores() -> int:
    """Cores that this process may use, at most MAX_PROCESSES."""
    return min(len(os.sched_getaffinity(0)), MAX_PROCESSES)


@contextmanager
def ordered(
    work: Callable[[range], T], count: int, *, processes: int | None = None, alone_below: int = ALONE_BELOW
) -> Iterator[Iterator[T]]:
    """Yields an iterator of `work(range of numbers)` over the numbers below `count`, in order.

    `work` runs in forked processes (default: one a core) and must return what can be pickled; where one process is
    enough, it runs here. Nothing is left running when the context ends.
    """
    global _work
    parts = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    processes = processes or available_cores()
    if count < alone_below or processes == 1 or len(parts) == 1:
        yield map(work, parts)
        return
    _work = work
    try:
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            yield pool.imap(_call, parts)
    finally:
        _work = None


def _call(part: range) -> object:
    assert _work is not None
    return _work(part)
