"""The records of a JSON list or a JSONL file one behind the other, in constant memory."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mindspeed_mm.data.record_starts import JSON_SPACE, MAX_RECORD_BYTES, list_values
from mindspeed_mm.errors import DataError

HEAD_BYTES = 65536
"""White space in front of the first record is at most that long."""


def record_stream(
    file: BinaryIO, source: str | Path, position: int = 0, number: int = 0
) -> Iterator[tuple[bytes, int]]:
    """(text of a record, the byte behind it) of a JSON list or JSONL.

    Args:
        source: the file's name, for messages.
        position: a byte that was yielded before; 0: the beginning.
        number: of the first record that follows.

    Raises:
        DataError: a list that is damaged, with record and byte; a line that is too long.
    """
    file.seek(0)
    head = file.read(HEAD_BYTES)
    content = head.removeprefix(codecs.BOM_UTF8).lstrip(JSON_SPACE)
    begin = len(head) - len(content)
    try:
        if content[:1] == b"[":
            yield from list_values(file, position or begin + 1, number)
            return
    except ValueError as error:
        raise DataError(f"{source}: {error}. Download or copy the file again.") from error
    file.seek(position or begin)
    while line := file.readline(MAX_RECORD_BYTES + 1):
        if len(line) > MAX_RECORD_BYTES:
            raise DataError(f"{source}: record {number} is longer than {MAX_RECORD_BYTES} bytes; expected JSONL.")
        if line.strip(JSON_SPACE):
            yield line, file.tell()
