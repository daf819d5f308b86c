"""Records of a parquet file by number; needs the optional package pyarrow.

A row group is read as a whole and the last ones are kept, so files with small row groups (datasets with images have
about 100 rows in one) are read at constant memory.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_mm.data.index import Index
from mindspeed_mm.data.progress import progress_bar
from mindspeed_mm.errors import ConfigError, DataError

KEPT_GROUPS = 2


class ParquetFile:
    """As RecordFile, for parquet. Safe to use from several processes; can be pickled."""

    def __init__(
        self,
        path: str | Path,
        check: Callable[[dict[str, Any], str], Any] | None = None,
        *,
        index: Index | None = None,
        problems: list[DataError] | None = None,
    ):
        """Arguments as RecordFile's. Raises DataError for a missing, empty or damaged file, ConfigError without
        pyarrow."""
        self.path = Path(path)
        self._file: Any = None
        self._groups: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()
        metadata = self._open().metadata
        self._ends = list(accumulate(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)))
        if not self._ends or not self._ends[-1]:
            raise DataError(f"{self.path} holds no records; expected rows with messages.")
        if check is not None:
            index = index or Index(self.path, None)
            index.array("checked", np.int64, lambda: self._check(check))

    def _check(self, check: Callable[[dict[str, Any], str], Any]) -> np.ndarray:
        with progress_bar(f"checking {self.path.name}", len(self)) as advance:
            for number in range(len(self)):
                check(self[number], self.where(number))
                advance(1)
        return np.asarray([len(self)])

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> dict[str, Any]:
        group = bisect_right(self._ends, number)
        rows = self._rows(group)
        return rows[number - (self._ends[group - 1] if group else 0)]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None, "_groups": OrderedDict()}

    def where(self, number: int) -> str:
        """Name of a record for messages."""
        return f"{self.path}: record {number}"

    def _rows(self, group: int) -> list[dict[str, Any]]:
        if group not in self._groups:
            try:
                self._groups[group] = self._open().read_row_group(group).to_pylist()
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{self.path}: row group {group} cannot be read ({error}). Fetch the file again."
                ) from error
            while len(self._groups) > KEPT_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        return self._groups[group]

    def _open(self) -> Any:
        """The open file of this process (a forked worker must not share a position with its parent)."""
        owner = os.getpid()
        if self._file is None or self._file[0] != owner:
            try:
                import pyarrow
                import pyarrow.parquet
            except ImportError as error:
                raise ConfigError(
                    f"{self.path} is parquet, which needs pyarrow: pip install mindspeed-mm[parquet], or convert it to "
                    "JSONL."
                ) from error
            try:
                self._file = (owner, pyarrow.parquet.ParquetFile(self.path))
            except (OSError, pyarrow.ArrowException) as error:
                raise DataError(f"cannot read the data file {self.path}: {error}. Correct data_path.") from error
        return self._file[1]
