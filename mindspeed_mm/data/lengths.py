"""Expanded lengths of all samples, known before training.

They are counted once by all cores, stored like other indexes, and cost 4 bytes a record.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mindspeed_mm.data.expand import Encoding, fit_length
from mindspeed_mm.data.progress import progress_bar
from mindspeed_mm.data.sample import Sample
from mindspeed_mm.errors import DataError

CHUNK = 512
ALONE_BELOW = 4 * CHUNK
"""So few records are counted in this process."""

MAX_PROCESSES = 16
UNUSABLE = np.iinfo(np.int32).min
"""Length of a sample that the policy leaves out."""

_work: Callable[[int], int] | None = None
"""Set before worker processes are forked, which inherit it."""


def usable_length(sample: Sample, encoding: Encoding, max_length: int, policy: str) -> int:
    """Length of a sample as it is trained on, negative without images, UNUSABLE where the policy leaves it out.

    Raises DataError for a sample that is too long under the policy "error".
    """
    ids, labels = encoding.of(sample)
    if len(ids) > max_length and policy == "drop":
        return UNUSABLE
    try:
        ids, labels = fit_length(ids, labels, max_length, policy)
    except DataError as error:
        if policy == "error":
            raise type(error)(f"{sample.where}: {error}") from error
        return UNUSABLE
    return len(ids) if sample.images else -len(ids)


def refuse_overlong(sample: Sample, encoding: Encoding, max_length: int) -> int:
    """0; raises DataError for a sample that is too long. Most samples need no tokenising to be seen to fit."""
    if encoding.upper_bound(sample) > max_length:
        usable_length(sample, encoding, max_length, "error")
    return 0


def count_all(title: str, count: int, work: Callable[[int], int]) -> np.ndarray:
    """`work(number)` for all numbers below `count`, [count] int32, in parallel where that pays.

    The first DataError comes out.
    """
    result = np.empty(count, dtype=np.int32)
    with progress_bar(title, count) as advance, _mapper(work, count) as mapped:
        for start, values in mapped:
            if isinstance(values, DataError):
                raise values
            result[start : start + len(values)] = values
            advance(len(values))
    return result


@contextmanager
def _mapper(work: Callable[[int], int], count: int) -> Iterator[Iterator[tuple[int, Any]]]:
    global _work
    ranges = [(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    processes = min(len(os.sched_getaffinity(0)), MAX_PROCESSES)
    if count < ALONE_BELOW or processes == 1:
        yield (_chunk_of(work, part) for part in ranges)
        return
    _work = work
    try:
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            yield pool.imap(_chunk, ranges)
    finally:
        _work = None


def _chunk(part: tuple[int, int]) -> tuple[int, Any]:
    assert _work is not None
    return _chunk_of(_work, part)


def _chunk_of(work: Callable[[int], int], part: tuple[int, int]) -> tuple[int, Any]:
    try:
        return part[0], [work(number) for number in range(*part)]
    except DataError as error:
        error.__cause__ = error.__context__ = None  # may not survive pickling
        return part[0], error
