"""What the rows of the cache hold, so that a prompt continues where another one began alike.

A row's content is an array of int64, one value a position: the token's id, or a part of the digest of the image that
stands there. Rows in use are known to the scheduler; the free ones keep what they held, the least recently used gives
way first. No memory is set aside for this.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
from mindspeed_mm.errors import DataError
from mindspeed_mm.generation.images import FoundImage

MIN_REUSE = 16
"""Positions that are worth another row's; fewer are computed again."""

SIGN = np.int64(-(2**63))
"""Set in the words of digests, so that none of them is a token's id."""


def content(prompt: Sequence[int], images: Sequence[FoundImage], tokens_per_image: int) -> np.ndarray:
    """Content [S] int64 of an expanded prompt, whose image positions show `images` one after the other.

    Raises:
        DataError: the positions are not those of so many images.
    """
    values = np.array(prompt, dtype=np.int64)
    places = np.flatnonzero(values == IMAGE_TOKEN_INDEX)
    if len(places) != len(images) * tokens_per_image:
        raise DataError(
            f"a prompt has {len(places)} image positions for {len(images)} images; expected {tokens_per_image} each"
        )
    if images:
        words = [np.resize(np.frombuffer(image.key, dtype=np.int64) | SIGN, tokens_per_image) for image in images]
        values[places] = np.concatenate(words)
    return values


def common(first: np.ndarray, second: np.ndarray) -> int:
    """Length of the common beginning of two contents."""
    length = min(len(first), len(second))
    differ = first[:length] != second[:length]
    return int(differ.argmax()) if differ.any() else length


def longest(values: np.ndarray, rows: Iterable[tuple[int, np.ndarray]]) -> tuple[int | None, int]:
    """The row that shares most with `values`, and how much; None where it is less than MIN_REUSE.

    The last position is left out: its logits are wanted, so it is computed in any case.
    """
    best, length = None, MIN_REUSE - 1
    for row, held in rows:
        shared = common(values[:-1], held)
        if shared > length:
            best, length = row, shared
    return best, length if best is not None else 0


@dataclass
class _Kept:
    values: np.ndarray
    used: int
    """Number of the use; a larger one is more recent."""


class KeptRows:
    """Contents of free rows."""

    def __init__(self) -> None:
        self._kept: dict[int, _Kept] = {}
        self._uses = 0

    def __iter__(self) -> Iterable[tuple[int, np.ndarray]]:
        return ((row, kept.values) for row, kept in self._kept.items())

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, row: int, values: np.ndarray) -> None:
        """Note what a row that has become free holds."""
        self._uses += 1
        if len(values) >= MIN_REUSE:
            self._kept[row] = _Kept(values, self._uses)

    def touch(self, row: int) -> None:
        """Note that a row was of use."""
        self._uses += 1
        if row in self._kept:
            self._kept[row].used = self._uses

    def drop_covered(self, row: int, values: np.ndarray) -> None:
        """Forget what a row holds, if another one will hold (almost) all of it with `values`."""
        kept = self._kept.get(row)
        if kept is not None and len(kept.values) - common(kept.values, values) < MIN_REUSE:
            del self._kept[row]

    def make_way(self, rows: Iterable[int], spare: Sequence[int]) -> list[tuple[int, int]]:
        """Move what `rows` hold into `spare` rows, empty ones first, then those used less recently; the rest is lost.

        Returns:
            (from, to) of the copies that the cache has to make.
        """
        leaving = sorted((row for row in rows if row in self._kept), key=lambda row: -self._kept[row].used)
        slots = sorted(spare, key=lambda row: self._kept[row].used if row in self._kept else 0)
        moves = []
        for row in leaving:
            kept = self._kept.pop(row)
            if slots and (slots[0] not in self._kept or self._kept[slots[0]].used < kept.used):
                self._kept[slots[0]] = kept
                moves.append((row, slots.pop(0)))
        return moves

    def longest_kept(self) -> int:
        """Positions of the longest content."""
        return max((len(kept.values) for kept in self._kept.values()), default=0)
