"""Random access to the members of a large JSON object, by number and by key, at constant memory.

The file is read once. 24 bytes a member say where it is, 16 more find it by its key: both are stored and mapped as the
places of records are (see index.py).
"""

from __future__ import annotations

import hashlib
import os
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_mm.data.index import Index
from mindspeed_mm.data.progress import progress_bar
from mindspeed_mm.data.record_starts import STRICT_DECODER, object_members
from mindspeed_mm.errors import ConfigError, DataError

PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz")
"""Suffixes of files that may run code when they are read."""


def refuse_pickle(path: str | Path) -> None:
    """Raise DataError for a file whose name says that it is a pickle."""
    if str(path).lower().endswith(PICKLES):
        raise DataError(
            f"{path} may be a pickle, which can run code when it is read; expected JSON or parquet. Convert it "
            "where you trust it."
        )


class KeyTable:
    """Numbers of keys, found by bisection in sorted digests."""

    def __init__(self, rows: np.ndarray):
        """`rows` as `key_rows` makes them."""
        self._digests, self._numbers = rows[:, 0], rows[:, 1]

    def candidates(self, key: str) -> list[int]:
        """Numbers of the keys with this one's digest: nearly always one or none."""
        digest = _digest(key)
        first = int(np.searchsorted(self._digests, digest, side="left"))
        last = int(np.searchsorted(self._digests, digest, side="right"))
        return self._numbers[first:last].tolist()

    @property
    def twins(self) -> list[tuple[int, int]]:
        """Pairs of numbers whose keys may be equal."""
        found = np.flatnonzero(self._digests[1:] == self._digests[:-1])
        return [(int(self._numbers[place]), int(self._numbers[place + 1])) for place in found]


def key_rows(digests: array) -> np.ndarray:
    """[n, 2] int64 of the digests of n keys in order: (digest, number), sorted."""
    values = np.frombuffer(digests, dtype=np.int64)
    order = np.argsort(values, kind="stable")
    return np.stack([values[order], order], axis=1)


def key_digests(keys: Any) -> array:
    """8 bytes of each text."""
    return array("q", (_digest(key) for key in keys))


def _digest(key: str) -> int:
    content = key.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


class JsonMembers:
    """The members of a file's object, or of the object that is its member `inside`."""

    def __init__(self, path: str | Path, *, index: Index | None = None, inside: str | None = None):
        """Find the members, or take a stored index that fits.

        Raises DataError for a missing, empty or damaged file, and for a key that is there twice.
        """
        self.path, self._inside = Path(path), inside
        refuse_pickle(path)
        index = index or Index(self.path, None)
        self._descriptor: int | None = None
        self._rows: np.ndarray = index.array("members", np.int64, self._find, inside=inside).reshape(-1, 5)
        self._table = KeyTable(self._rows[:, 3:])
        for first, second in self._table.twins:
            if self.key(first) == self.key(second):
                raise DataError(
                    f'{self._name()} has the key "{self.key(first):.80}" twice (bytes {self._rows[first, 0]} and '
                    f"{self._rows[second, 0]}); expected each id once. Remove one."
                )

    def _name(self) -> str:
        return f"{self.path}" if self._inside is None else f'"{self._inside}" of {self.path}'

    def _find(self) -> np.ndarray:
        places, digests = array("q"), array("q")
        try:
            with (
                self.path.open("rb") as file,
                progress_bar(f"indexing {self.path.name}", self.path.stat().st_size) as advance,
            ):
                for key, place, begin, end in object_members(file, self._inside):
                    places.extend((place, begin, end))
                    digests.append(_digest(key))
                    advance(end - place)
        except OSError as error:
            raise DataError(
                f"cannot read {self.path}: {error.strerror}. Correct the path or its permissions."
            ) from error
        except ValueError as error:
            raise DataError(
                f"{self.path} cannot be parsed: {error}. Expected a JSON object by id; fetch the file again."
            ) from error
        if not digests:
            raise DataError(f"{self._name()} holds nothing; expected members by id.")
        rows = np.frombuffer(places, dtype=np.int64).reshape(-1, 3)
        return np.concatenate([rows, key_rows(digests)], axis=1).reshape(-1)

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, number: int) -> str:
        """The key of a member."""
        place, begin, _ = self._rows[number, :3].tolist()
        return self._read(place, begin)

    def value(self, number: int) -> Any:
        """The value of a member. Raises DataError where the file has changed."""
        _, begin, end = self._rows[number, :3].tolist()
        return self._read(begin, end)

    def size(self, number: int) -> int:
        """Bytes of a member's value as it is written."""
        return int(self._rows[number, 2] - self._rows[number, 1])

    def find(self, key: str) -> int | None:
        """The number of the member with this key; None where there is none."""
        return next((number for number in self._table.candidates(key) if self.key(number) == key), None)

    def _read(self, begin: int, end: int) -> Any:
        """The JSON value that begins at a byte of the file and ends before another."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        try:
            return STRICT_DECODER.raw_decode(os.pread(self._descriptor, end - begin, begin).decode("utf-8"))[0]
        except ConfigError as error:
            raise DataError(f"{self.path}, bytes {begin} to {end}: {error}") from error
        except ValueError as error:
            raise DataError(
                f"{self.path}, bytes {begin} to {end}: no text in UTF-8, or changed since it was indexed ({error}). "
                "Save the file as UTF-8, and start again."
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)

    def line(self, number: int) -> int:
        """The line of the file on which a member's value begins, counted from 1."""
        with self.path.open("rb") as file:
            left, line = int(self._rows[number, 1]), 1
            while left > 0 and (block := file.read(min(left, 2**20))):
                line += block.count(b"\n")
                left -= len(block)
        return line
