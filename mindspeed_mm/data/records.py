"""Random access to the records of a JSON list or a JSONL file at constant memory.

The file is read once: every record is parsed and checked (so that damage is found before training, not within it) and
the byte at which it starts is kept, 8 bytes a record. For large files that index is stored and mapped (see index.py),
so that later starts, other ranks and workers read it from there.
"""

import codecs
import json
import os
import re
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_mm.data.index import Index
from mindspeed_mm.data.parallel import CHUNK, ordered
from mindspeed_mm.data.progress import progress_bar
from mindspeed_mm.errors import DataError

BLOCK_BYTES = 4 * 2**20
MAX_RECORD_BYTES = 64 * 2**20
"""A longer record is taken for damage (an unclosed bracket would swallow the rest of the file)."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
JSON_SPACE = b" \t\r\n"
JSON_SPACES = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()


class RecordFile:
    """The records of one file. Safe to use from several processes at once; can be pickled."""

    def __init__(
        self,
        path: str | Path,
        check: Callable[[dict[str, Any], str], Any] | None = None,
        *,
        index: Index | None = None,
        problems: list[DataError] | None = None,
    ):
        """Index the file, or take a stored index that fits; `check(record, where)` is called for every record that is
        read for that and may raise DataError. With `problems`, damage is put there and what can still be read is kept.

        Raises DataError for a missing, empty or damaged file, naming the record and its line.
        """
        self.path = Path(path)
        self._descriptor: int | None = None
        self._problems = problems
        index = index or Index(self.path, None)
        # The last entry is the byte after the last record.
        self._starts: np.ndarray = index.array("starts", np.int64, lambda: self._index(check))

    def _index(self, check: Callable[[dict[str, Any], str], Any] | None) -> np.ndarray:
        starts, last = array("q"), 0
        total = self.path.stat().st_size if self.path.is_file() else 0
        with progress_bar(f"indexing {self.path.name}", total) as advance:
            for number, (record, start, end) in enumerate(self._scan()):
                where = self.where(number)
                if not isinstance(record, dict):
                    problem = DataError(
                        f"{where} is {_shown(record)}; expected an object with conversations, such as "
                        '{"id": "1", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": '
                        '"Hello"}]}.'
                    )
                    self._meet(problem)
                    continue
                starts.append(start)
                advance(end - last)
                last = end
        if not starts and not self._problems:
            raise DataError(f"{self.path} holds no records; expected a JSON list or JSONL of conversations.")
        starts.append(last)
        self._starts = np.frombuffer(starts, dtype=np.int64)
        if check is not None:
            self._check_all(check)
        return self._starts

    def _check_all(self, check: Callable[[dict[str, Any], str], Any]) -> None:
        """Check every record by all cores; the first DataError in the order of the file comes out."""

        def first_error(numbers: range) -> DataError | None:
            try:
                for number in numbers:
                    check(self[number], self.where(number))
            except DataError as error:
                error.__cause__ = error.__context__ = None  # may not survive pickling
                return error
            return None

        with (
            progress_bar(f"checking {self.path.name}", len(self)) as advance,
            ordered(first_error, len(self)) as errors,
        ):
            for error in errors:
                if error is not None:
                    raise error
                advance(CHUNK)

    def _meet(self, problem: DataError) -> None:
        """Raise a problem, or keep it where problems are collected."""
        if self._problems is None:
            raise problem
        self._problems.append(problem)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> dict[str, Any]:
        start, end = int(self._starts[number]), int(self._starts[number + 1])
        if self._descriptor is None:
            self._descriptor = self._open()
        raw = os.pread(self._descriptor, end - start, start)
        try:
            # Behind a record come the separators before the next one.
            record, _ = DECODER.raw_decode(raw.decode("utf-8").lstrip())
        except ValueError as error:
            raise DataError(
                f"{self.where(number)} is not JSON any more; the file has changed since the start."
            ) from error
        return record

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)

    def where(self, number: int) -> str:
        """Name of a record for messages; records count from 0 as in a Python list."""
        return f"{self.path}: record {number}"

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise DataError(
                f"cannot read the data file {self.path}: {error.strerror}. Correct data_path or its permissions."
            ) from error

    def _scan(self) -> Iterator[tuple[Any, int, int]]:
        """(record, first byte, byte after the last) of every record."""
        descriptor = self._open()
        try:
            with os.fdopen(descriptor, "rb") as file:
                start = 3 if file.read(3) == BYTE_ORDER_MARK else 0
                file.seek(start)
                head = file.read(BLOCK_BYTES)
                first = head.lstrip(JSON_SPACE)[:1]
                start += len(head) - len(head.lstrip(JSON_SPACE))
                if first == b"[":
                    yield from self._scan_list(file, start)
                else:
                    yield from self._scan_lines(file, start)
        except OSError as error:
            raise DataError(f"cannot read the data file {self.path}: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"the data file {self.path} is not UTF-8 text ({error.reason}); save it as UTF-8."
            ) from error

    def _scan_lines(self, file: Any, position: int) -> Iterator[tuple[Any, int, int]]:
        file.seek(position)
        number = 0
        for line in iter(lambda: file.readline(MAX_RECORD_BYTES), b""):
            end = position + len(line)
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    self._meet(self._damage(number, position, str(error)))
                else:
                    yield record, position, end
                    number += 1
            position = end

    def _scan_list(self, file: Any, position: int) -> Iterator[tuple[Any, int, int]]:
        """Elements of a top-level list, block by block; `position` is that of its opening bracket."""
        reader = _Reader(file, position + 1)
        decoder = json.JSONDecoder()
        number = 0
        if reader.skip_space() == "]":
            return
        while True:
            try:
                record, start, end = reader.decode(decoder)
            except (ValueError, RecursionError) as error:
                self._meet(self._damage(number, reader.position, str(error)))
                return
            yield record, start, end
            number += 1
            mark = reader.skip_space()
            if mark not in (",", "]"):
                reason = f"expected a comma or the list's end, found {mark!r}"
                self._meet(self._damage(number, reader.position, reason))
                return
            reader.advance(1)
            if mark == "]":
                break
        rest = reader.skip_space()
        if rest:
            self._meet(self._damage(number, reader.position, f"the list has ended, yet {rest!r} follows"))

    def _damage(self, number: int, position: int, reason: str) -> DataError:
        with self.path.open("rb") as file:
            line, left = 1, position
            while left > 0 and (block := file.read(min(left, BLOCK_BYTES))):
                line += block.count(b"\n")
                left -= len(block)
        return DataError(
            f"{self.where(number)} (line {line}) cannot be parsed: {reason}. Expected one JSON list of records, or one "
            "record per line; correct the file there."
        )


class _Reader:
    """A window of text on a UTF-8 file that grows while a JSON value does not fit into it; counts bytes."""

    def __init__(self, file: Any, position: int):
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._offset = 0
        self.position = position
        """Byte of the file at which the window's unread part starts."""

        file.seek(position)

    def _more(self) -> bool:
        block = self._file.read(BLOCK_BYTES)
        self._text = self._text[self._offset :] + self._decoder.decode(block, final=not block)
        self._offset = 0
        return bool(block)

    def advance(self, count: int) -> None:
        """Move over `count` characters."""
        self.position += len(self._text[self._offset : self._offset + count].encode())
        self._offset += count

    def skip_space(self) -> str:
        """Move to the next character that is not white space and return it; empty at the end of the file."""
        while True:
            match = JSON_SPACES.match(self._text, self._offset)
            self.advance(match.end() - self._offset)
            if self._offset < len(self._text):
                return self._text[self._offset]
            if not self._more():
                return ""

    def decode(self, decoder: json.JSONDecoder) -> tuple[Any, int, int]:
        """The object at the current position and its first and last byte (exclusive); moves behind it.

        Raises ValueError.
        """
        if self.skip_space() != "{":
            raise ValueError(f"expected an object, found {self.skip_space() or 'the end of the file'!r}")
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._offset)
            except json.JSONDecodeError:
                # Either damage or an object that the window cuts off: only more text can tell.
                if len(self._text) - self._offset > MAX_RECORD_BYTES or not self._more():
                    raise
                continue
            start = self.position
            self.advance(end - self._offset)
            return value, start, self.position


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."
