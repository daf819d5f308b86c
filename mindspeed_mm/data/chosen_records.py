"""The records of a file that a set takes: some are left out, others are taken several times with other values."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from mindspeed_mm.data.index import Index
from mindspeed_mm.data.parquet import ParquetFile
from mindspeed_mm.data.progress import progress_bar
from mindspeed_mm.data.records import RecordFile
from mindspeed_mm.errors import DataError

logger = logging.getLogger(__name__)

Choose = Callable[[dict[str, Any]], list[dict[str, Any]]]
"""A record -> what is taken for it: nothing, itself, or several records. It must not fail for a broken one."""


class ChosenRecords:
    """As RecordFile or ParquetFile, over what `choose` makes of the file's records; messages name those of the file."""

    def __init__(
        self,
        path: str,
        *,
        index: Index | None = None,
        problems: list[DataError] | None = None,
        choose: Choose,
        key: dict[str, Any],
    ) -> None:
        """`key` says what `choose` depends on besides the record. Raises DataError as RecordFile, and where nothing is
        left."""
        opened = ParquetFile if path.endswith(".parquet") else RecordFile
        self._records: Any = opened(path, index=index, problems=problems)
        self._choose = choose
        self.path = self._records.path
        counts = (index or Index(self.path, None)).array("chosen", np.int32, self._counts, **key)
        self._numbers = np.repeat(np.arange(len(counts)), counts)
        self._ends = np.cumsum(counts)
        if not len(self._numbers):
            raise DataError(f"{path}: none of {len(counts)} records is left by {key}; correct these keys of grounding")
        left_out = int((np.asarray(counts) == 0).sum())
        if left_out:
            logger.info("%s: %d of %d records are left out by %s", path, left_out, len(counts), key)

    def _counts(self) -> np.ndarray:
        counts = np.ones(len(self._records), dtype=np.int32)
        with progress_bar("choosing records", len(counts)) as advance:
            for number in range(len(counts)):
                counts[number] = len(self._choose(self._records.verified(number)))
                advance(1)
        return counts

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self._taken(number, self._records.__getitem__)

    def verified(self, number: int) -> dict[str, Any]:
        """As RecordFile.verified."""
        return self._taken(number, self._records.verified)

    def _taken(self, number: int, read: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
        place = int(self._numbers[number])
        before = int(self._ends[place - 1]) if place else 0
        return self._choose(read(place))[number - before]

    def where(self, number: int) -> str:
        """Name of a record for messages, by its place in the file."""
        return self._records.where(int(self._numbers[number]))

    def line(self, number: int) -> int:
        """The line of the file on which it stands; 0 in parquet, which has none."""
        line = getattr(self._records, "line", None)
        return 0 if line is None else line(int(self._numbers[number]))
