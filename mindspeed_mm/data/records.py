"""Random access to the records of a JSON list or a JSONL file at constant memory.

The file is read once for the byte at which each record starts, 8 bytes a record. For large files that index is stored
and mapped (see index.py), so that later starts, other ranks and workers read it from there.
"""

import codecs
import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_mm.data import record_starts
from mindspeed_mm.data.conversation import EXAMPLE, shown
from mindspeed_mm.data.index import Index
from mindspeed_mm.data.progress import progress_bar
from mindspeed_mm.data.record_starts import DECODER, JSON_SPACE, STRICT_DECODER, line_starts, list_starts
from mindspeed_mm.data.storage.objects import local_file
from mindspeed_mm.errors import DataError

HEAD_BYTES = 65536
"""White space in front of the first record is at most that long."""

NEAR = 30
"""Bytes shown on each side of damage."""


OTHER_KINDS = {
    b"\x1f\x8b": "compressed (gzip): unpack it with gunzip",
    b"BZh": "compressed (bzip2): unpack it with bunzip2",
    b"\xfd7zXZ": "compressed (xz): unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "compressed (zstd): unpack it with unzstd",
    b"PK\x03\x04": "a zip archive (or a table of a spreadsheet): unpack or export it",
    b"PAR1": "parquet: give it a name that ends in .parquet",
}
"""First bytes of files that are no text."""


class RecordFile:
    """The records of one file. Safe to use from several processes at once; can be pickled."""

    def __init__(self, path: str | Path, *, index: Index | None = None, problems: list[DataError] | None = None):
        """Find the records, or take a stored index that fits. With `problems`, damage is put there and what can still
        be read is kept. Of an address (`s3://`) the copy of this host is read.

        Raises DataError for a missing or empty file, and for a list that is damaged, naming record and line. A damaged
        record of a JSONL file is found when it is read.
        """
        self.name, self.path = path, Path(local_file(path))
        self._descriptor: int | None = None
        self._problems = problems
        self._counted = (0, 1)
        index = index or Index(self.path, None)
        # The last entry is the byte after the last record.
        self._starts: np.ndarray = index.array("starts", np.int64, self._index)

    def _index(self) -> np.ndarray:
        try:
            with os.fdopen(self._open(), "rb") as file:
                position, is_list = self._head(file)
                total = os.fstat(file.fileno()).st_size
                with progress_bar(f"indexing {self.path.name}", total) as advance:
                    if is_list:
                        starts, damage = list_starts(file, position, advance)
                    else:
                        starts, damage = line_starts(file, position, advance), None
        except OSError as error:
            raise DataError(f"cannot read the data file {self.name}: {error.strerror}.") from error
        if damage is not None:
            self._meet(self._damage(damage.number, damage.position, damage.reason))
        elif len(starts) == 1:
            self._meet(
                DataError(f"{self.name} holds no records; expected a JSON list or JSONL of records such as {EXAMPLE}.")
            )
        return starts

    def _head(self, file: Any) -> tuple[int, bool]:
        """(byte of the first character that is not white space, whether it opens a list)."""
        head = file.read(HEAD_BYTES)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise DataError(f"the data file {self.name} is UTF-16 text; save it as UTF-8.")
        kind = next((kind for mark, kind in OTHER_KINDS.items() if head.startswith(mark)), None)
        if kind is not None:
            raise DataError(f"the data file {self.name} is {kind}; expected JSON or JSONL as plain text.")
        text = head.removeprefix(codecs.BOM_UTF8)
        content = text.lstrip(JSON_SPACE)
        return len(head) - len(content), content[:1] == b"["

    def _meet(self, problem: DataError) -> None:
        """Raise a problem, or keep it where problems are collected."""
        if self._problems is None:
            raise problem
        self._problems.append(problem)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> dict[str, Any]:
        try:
            # Behind a record come the separators before the next one.
            record, _ = DECODER.raw_decode(self._raw(number).decode("utf-8").lstrip())
        except ValueError as error:
            raise DataError(
                f"{self.where(number)} is not JSON any more; the file has changed since the start."
            ) from error
        return record

    def verified(self, number: int) -> dict[str, Any]:
        """A record that is read for the first time. Raises DataError naming line and place for what is no object of
        JSON."""
        start, size = int(self._starts[number]), int(self._starts[number + 1] - self._starts[number])
        if size > record_starts.MAX_RECORD_BYTES:
            raise self._damage(number, start, f"it is {size} bytes long, which no record is")
        raw = self._raw(number)
        try:
            text = raw.decode("utf-8").rstrip(" \t\r\n")
            begin = len(text) - len(text.lstrip(" \t\r\n"))
            record, end = STRICT_DECODER.raw_decode(text, begin)
        except UnicodeDecodeError as error:
            raise self._damage(number, start + error.start, f"it is not UTF-8 text ({error.reason})") from error
        except json.JSONDecodeError as error:
            raise self._damage(number, start + len(text[: error.pos].encode()), error.msg) from error
        except (ValueError, RecursionError) as error:
            raise self._damage(number, start, str(error)) from error
        rest = text[end:].lstrip(" \t\r\n")
        if rest and not (rest[0] in ",]" and self._is_list()):
            place = len(raw.rstrip(JSON_SPACE)) - len(rest.encode())
            raise self._damage(number, start + place, "something follows the record in its line")
        if not isinstance(record, dict):
            raise DataError(f"{self.where(number)} is {shown(record)}; expected an object, such as {EXAMPLE}.")
        return record

    def _raw(self, number: int) -> bytes:
        start, end = int(self._starts[number]), int(self._starts[number + 1])
        if self._descriptor is None:
            self._descriptor = self._open()
        return os.pread(self._descriptor, end - start, start)

    def _is_list(self) -> bool:
        with self.path.open("rb") as file:
            return self._head(file)[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)

    def where(self, number: int) -> str:
        """Name of a record for messages; records count from 0 as in a Python list."""
        return f"{self.name}: record {number}"

    def line(self, number: int) -> int:
        """The line of the file on which a record starts, counted from 1; cheap for records asked for in order."""
        raw = self._raw(number)
        start = int(self._starts[number]) + len(raw) - len(raw.lstrip(JSON_SPACE))
        place, line = self._counted if self._counted[0] <= start else (0, 1)
        with self.path.open("rb") as file:
            file.seek(place)
            while place < start and (block := file.read(min(start - place, record_starts.BLOCK_BYTES))):
                line += block.count(b"\n")
                place += len(block)
        self._counted = (place, line)
        return line

    def _open(self) -> int:
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):  # one would wait for what writes into a pipe
                raise DataError(
                    f"cannot read the data file {self.name}: it is a folder, a pipe or a device. Name a regular file, "
                    "which is read in any order."
                )
            return os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise DataError(
                f"cannot read the data file {self.name}: {error.strerror}. Correct data_path or its permissions."
            ) from error

    def _damage(self, number: int, position: int, reason: str) -> DataError:
        line, column, left = 1, position + 1, position
        with self.path.open("rb") as file:
            while left > 0 and (block := file.read(min(left, record_starts.BLOCK_BYTES))):
                line += block.count(b"\n")
                left -= len(block)
                if b"\n" in block:
                    column = len(block) - block.rindex(b"\n") + left
            file.seek(max(position - NEAR, 0))
            near = file.read(min(position, NEAR) + NEAR)
        if near[min(position, NEAR) :][:1] == b"\0":
            reason = "there are NUL bytes, as in a file that was copied in part"
        expected = "a list of records" if self._is_list() else "one record per line"
        text = near.decode("utf-8", errors="replace")
        return DataError(
            f"{self.where(number)} (line {line}, byte {column}) cannot be parsed: {reason}, near {text!r}. Expected "
            f"{expected}, such as {EXAMPLE}; correct the file there."
        )
