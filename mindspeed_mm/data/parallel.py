"""Work on all records of a file by all cores, results in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
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

_FAULTS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)

HELD = 4
"""Results that a process may be ahead of the one that is waited for."""


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

    Iterating raises:
        ValueError, OSError: what `work` raised.
        DataError: a process was ended from outside.
        RuntimeError: a process failed otherwise; it has shown its traceback, where Python could.
    """
    parts = [range(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    processes = min(processes or available_cores(), len(parts))
    if count < alone_below or processes <= 1:
        yield map(work, parts)
        return
    helpers: list[_Helper] = []
    try:
        for _ in range(processes):
            helpers.append(_Helper(work))
        yield _results(helpers, parts)
    finally:
        for helper in helpers:
            helper.end()


class _Helper:
    """A forked process that works on one part after the other.

    Its pipes are its own, so that its death is seen at once: a multiprocessing.Pool waits for ever for what a killed
    process was to bring.
    """

    def __init__(self, work: Callable[[range], object]) -> None:
        context = multiprocessing.get_context("fork")
        # No sockets, which a process that belongs to its parent gives up.
        taken, self._parts = context.Pipe(duplex=False)
        self.results, brought = context.Pipe(duplex=False)
        self._process = context.Process(target=_serve, args=(work, taken, brought), daemon=True)
        self._process.start()
        taken.close()
        brought.close()
        self.number: int | None = None
        """Of the part that it works on."""

    def give(self, number: int, part: range) -> None:
        """Have it work on a part."""
        self.number = number
        try:
            self._parts.send(part)
        except BrokenPipeError:
            raise self._lost() from None

    def take(self) -> tuple[object, Exception | None]:
        """What it has found, and what `work` raised instead. Raises the other errors that `ordered` names."""
        try:
            answer = self.results.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        self.number = None
        return answer

    def _lost(self) -> Exception:
        self._process.join()
        code = self._process.exitcode or 0
        if code >= 0:
            return RuntimeError("a process that reads data failed: its own traceback stands above")
        number = -code
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        if number in _FAULTS:
            return RuntimeError(f"a process that reads data ended with {name}, a fault of a compiled library")
        return DataError(
            f"a process that reads data was ended from outside ({name}). Most often the host has no memory left: give "
            "the run more of it, or fewer cores (taskset -c 0-3 ...; check-data: --workers), each of which has such a "
            "process"
        )

    def end(self) -> None:
        """End it now."""
        self._process.kill()
        self._process.join(1.0)  # one that stands in a dead file system is not waited for
        self._parts.close()
        self.results.close()


def _serve(work: Callable[[range], object], parts: Connection, results: Connection) -> None:
    """The course of a helper. A group of its own keeps a terminal's Ctrl-C from it, which is for its parent."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ending.belong_to_parent()
    while True:
        part = parts.recv()
        try:
            answer = work(part), None
        except (ValueError, OSError) as error:
            error.__cause__ = error.__context__ = None  # may not survive pickling
            answer = None, error
        results.send(answer)


def _results(helpers: Sequence[_Helper], parts: Sequence[range]) -> Iterator[Any]:
    """What the helpers bring, in the order of the parts."""
    found: dict[int, tuple[object, Exception | None]] = {}
    given = 0
    for number in range(len(parts)):
        while True:
            for helper in helpers:
                if helper.number is None and given < min(len(parts), number + HELD * len(helpers)):
                    helper.give(given, parts[given])
                    given += 1
            busy = {helper.results: helper for helper in helpers if helper.number is not None}
            for ready in wait(busy, timeout=0 if number in found else None):
                helper = busy[ready]
                place = helper.number
                assert place is not None
                found[place] = helper.take()
            if number in found:
                break
        result, error = found.pop(number)
        if error is not None:
            raise error
        yield result


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
