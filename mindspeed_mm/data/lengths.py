"""Expanded lengths of all samples, known before training.

They are counted once by all cores, stored like other indexes, and cost 4 bytes a record.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mindspeed_mm.data.expand import Encoding, fit_length
from mindspeed_mm.data.parallel import ordered
from mindspeed_mm.data.progress import progress_bar
from mindspeed_mm.data.sample import Sample
from mindspeed_mm.errors import DataError

UNUSABLE = np.iinfo(np.int32).min
"""Length of a sample that the policy leaves out."""


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

    def part_of(numbers: range) -> list[int] | DataError:
        try:
            return [work(number) for number in numbers]
        except DataError as error:
            error.__cause__ = error.__context__ = None  # may not survive pickling
            return error

    result, done = np.empty(count, dtype=np.int32), 0
    with progress_bar(title, count) as advance, ordered(part_of, count) as parts:
        for values in parts:
            if isinstance(values, DataError):
                raise values
            result[done : done + len(values)] = values
            done += len(values)
            advance(len(values))
    return result
