"""Several samples in one row of fixed length: which samples share a row.

Windows of the endless sample sequence are sorted into rows, each window by itself, so that rows depend on the sequence
alone and any row can be found again. Two ways are tried on each window and the one with fewer rows is taken: first-fit
decreasing (Johnson 1973), and rows that are opened by the longest sample left and filled up as well as a search over
sums can (in the manner of Gupta and Ho's minimum bin slack, 1999).
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from mindspeed_mm.data.sampler import Order
from mindspeed_mm.errors import ConfigError

KEPT_WINDOWS = 2

CANDIDATES = 48
"""Samples among which the rest of a row is searched, spread evenly over the lengths that are left."""


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths` [n]; the lengths of a row sum up to `capacity` at most.

    Raises ConfigError for a length over the capacity.
    """
    return min(first_fit_decreasing(lengths, capacity), fill_up(lengths, capacity), key=len)


def first_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths` [n]; the lengths of a row sum up to `capacity` at most.

    The longest come first, each into the first row that has room. Raises ConfigError for a length over the capacity.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise ConfigError(f"packing: a sample of {int(lengths.max())} tokens does not fit into a row of {capacity}")
    room = np.zeros(len(lengths), dtype=np.int64)
    rows: list[list[int]] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[index])
        fits = room[: len(rows)] >= size
        row = int(fits.argmax()) if len(rows) else 0
        if not len(rows) or not fits[row]:
            row = len(rows)
            rows.append([])
            room[row] = capacity
        rows[row].append(index)
        room[row] -= size
    return rows


def fill_up(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """As first_fit_decreasing, for lengths that fit: the longest sample left opens a row, and those of the candidates
    join it whose sum comes closest to the room that is left."""
    sizes = lengths.tolist()
    left = np.argsort(-lengths, kind="stable").tolist()
    rows: list[list[int]] = []
    while left:
        row = [left.pop(0)]
        room = capacity - sizes[row[0]]
        count = min(CANDIDATES, len(left))
        places = [place for place in (i * len(left) // count for i in range(count)) if sizes[left[place]] <= room]
        for place in reversed(_best_sum([sizes[left[place]] for place in places], room)):
            row.append(left.pop(places[place]))
        rows.append(row)
    return rows


def _best_sum(sizes: list[int], room: int) -> list[int]:
    """Positions of the sizes whose sum is the largest up to `room`, in ascending order."""
    # Bit s of an entry: the sum s can be reached with the sizes before it.
    reachable, mask = [1], (1 << (room + 1)) - 1
    for size in sizes:
        reachable.append((reachable[-1] | reachable[-1] << size) & mask)
        if reachable[-1] >> room:
            break
    rest, chosen = reachable[-1].bit_length() - 1, []
    for position in range(len(reachable) - 2, -1, -1):
        if not reachable[position] >> rest & 1:
            chosen.append(position)
            rest -= sizes[position]
    return chosen[::-1]


class PackedOrder:
    """Rows of samples of another order. Rows of a window are shuffled, so that length does not follow time."""

    def __init__(self, order: Order, lengths: np.ndarray, *, capacity: int, window: int, seed: int):
        """`lengths` [n] are in tokens by index of the dataset (a sign is ignored)."""
        self._order, self._lengths = order, lengths
        self._capacity, self._window, self._seed = capacity, window, seed
        self._ends: list[int] = []
        """Number of rows up to the end of each window that has been packed so far."""
        self._windows: dict[int, list[tuple[int, ...]]] = {}

    def at(self, position: int) -> tuple[int, ...]:
        """Indices of the samples of row `position`. Finding a far row packs all windows before it, once."""
        while not self._ends or self._ends[-1] <= position:
            number = len(self._ends)
            self._ends.append((self._ends[-1] if self._ends else 0) + len(self._rows(number)))
        number = bisect_right(self._ends, position)
        return self._rows(number)[position - (self._ends[number - 1] if number else 0)]

    def fill(self) -> float:
        """Share of the positions of the first window's rows that hold a sample."""
        rows = self._rows(0)
        used = sum(int(np.abs(self._lengths[list(row)]).sum()) for row in rows)
        return used / (self._capacity * len(rows))

    def _rows(self, number: int) -> list[tuple[int, ...]]:
        if number not in self._windows:
            self._windows = {known: rows for known, rows in self._windows.items() if known > number - KEPT_WINDOWS}
            members = [self._order.at(number * self._window + i) for i in range(self._window)]
            rows = pack(np.abs(self._lengths[members]), self._capacity)
            places = np.random.default_rng([self._seed, number]).permutation(len(rows))
            # Inside a row the samples keep the order of the sequence.
            self._windows[number] = [tuple(members[i] for i in sorted(rows[place])) for place in places]
        return self._windows[number]
