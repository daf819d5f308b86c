"""Images as base64 texts in one large file, found by their id: JSON {id: base64}, or parquet."""

from __future__ import annotations

import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_mm.data.conversation import shown
from mindspeed_mm.data.index import Index
from mindspeed_mm.data.json_members import JsonMembers, KeyTable, key_digests, key_rows, refuse_pickle
from mindspeed_mm.data.parquet import ParquetFile
from mindspeed_mm.errors import DataError

COLUMN = "base64"
MAX_BASE64 = 64 * 2**20
"""Characters of an image's text; 48 MiB of image."""


@dataclass(frozen=True)
class ImageText:
    """An encoded image whose text is read when it is needed (sample.EncodedImage)."""

    name: str
    """For messages."""
    file: JsonImages | ParquetImages
    number: int

    def __str__(self) -> str:
        return self.name

    @property
    def size(self) -> int:
        """Number of its bytes, with the text's padding; never 0 for what is no empty text."""
        text = str(self.file.text(self.number))
        return len(text) * 3 // 4 or len(text)

    def read(self) -> bytes:
        """Raises OSError for what is no base64, or too long."""
        text = self.file.text(self.number)
        if not isinstance(text, str):
            raise OSError(f"its value is {shown(text)}, no base64 in quotes")
        if len(text) > MAX_BASE64:
            raise OSError(f"its base64 has {len(text)} characters, at most {MAX_BASE64} are read")
        try:
            return binascii.a2b_base64(text, strict_mode=True)
        except ValueError as error:
            raise OSError(f"its text is no base64: {error}") from error


class JsonImages:
    """{id: base64} as JSON."""

    def __init__(self, path: str | Path, index: Index):
        """Raises DataError (see JsonMembers)."""
        self._members = JsonMembers(path, index=index)

    def find(self, identity: str) -> int | None:
        """The number of an image."""
        return self._members.find(identity)

    def text(self, number: int) -> Any:
        """What stands under its id."""
        return self._members.value(number)


class ParquetImages:
    """A parquet file with a column base64 and one of ids, whatever its name (pandas writes its index as one)."""

    def __init__(self, path: str | Path, index: Index):
        """Raises DataError for other columns, and for an id that is there twice."""
        self._path = path
        self._rows = ParquetFile(path, index=index)
        names = self._rows.names
        ids = [name for name in names if name != COLUMN]
        if COLUMN not in names or len(ids) != 1:
            raise DataError(f"{path} has the columns {', '.join(names)}; expected {COLUMN} and one of ids.")
        self._column = ids[0]
        rows = index.array("ids", np.int64, self._find)
        self._table = KeyTable(rows.reshape(-1, 2))
        for first, second in self._table.twins:
            if self._identity(first) == self._identity(second):
                raise DataError(
                    f"{path} has the id {self._identity(first):.80} in rows {first} and {second}; expected each "
                    "once. Remove one."
                )

    def _find(self) -> np.ndarray:
        return key_rows(key_digests(str(value) for value in self._rows.column(self._column))).reshape(-1)

    def _identity(self, number: int) -> str:
        return str(self._rows.cell(number, self._column))

    def find(self, identity: str) -> int | None:
        """The number of an image."""
        return next((number for number in self._table.candidates(identity) if self._identity(number) == identity), None)

    def text(self, number: int) -> Any:
        """What stands beside its id."""
        return self._rows.cell(number, COLUMN)


def open_images(path: str | Path, folder: Path | None) -> JsonImages | ParquetImages:
    """The images of a file; `folder` is where its index is stored. Raises DataError."""
    refuse_pickle(path)
    index = Index(path, folder)
    return ParquetImages(path, index) if str(path).endswith(".parquet") else JsonImages(path, index)
