"""Work on all records of a file by all cores, results in order."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from mindspeed_mm import ending
from mindspeed_mm.data.progress import progress_bar
from mindspeed_mm.errors import DataError

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
    work: Callable[[range], T],
    count: int,
    *,
    processes: int | None = None,
    alone_below: int = ALONE_BELOW,
    chunk: int = CHUNK,
) -> Iterator[Iterator[T]]:
    """Yields an iterator of `work(range of numbers)` over the numbers below `count`, in order.

    `work` runs in forked processes (default: one a core) and must return what can be pickled; where one process is
    enough, it runs here. Nothing is left running when the context ends.
    """
    global _work
    parts = [range(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    processes = processes or available_cores()
    if count < alone_below or processes == 1 or len(parts) == 1:
        yield map(work, parts)
        return
    _work = work
    try:
        with multiprocessing.get_context("fork").Pool(processes, initializer=ending.belong_to_parent) as pool:
            yield pool.imap(_call, parts)
    finally:
        _work = None


def _call(part: range) -> object:
    assert _work is not None
    return _work(part)


def count_all(title: str, count: int, work: Callable[[int], Any], *, columns: int = 1) -> np.ndarray:
    """`work(number)`, `columns` integers, for all numbers below `count`, in parallel where that pays.

    Returns [count, columns] int32, [count] for one column. The first DataError in the order of the numbers comes out.
    """

    def part_of(numbers: range) -> np.ndarray | DataError:
        try:
            return np.asarray([work(number) for number in numbers], dtype=np.int32)
        except DataError as error:
            error.__cause__ = error.__context__ = None  # may not survive pickling
            return error

    result, done = np.empty(count if columns == 1 else (count, columns), dtype=np.int32), 0
    with progress_bar(title, count) as advance, ordered(part_of, count) as parts:
        for values in parts:
            if isinstance(values, DataError):
                raise values
            result[done : done + len(values)] = values
            done += len(values)
            advance(len(values))
    return result
