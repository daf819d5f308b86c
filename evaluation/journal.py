"""Answers on disk as they come, so that a killed run goes on where it was.

A journal is a folder. Every run configuration, known by the fingerprint of all that answers depend on, has its own
files in it, one per rank, with one JSON object a line. Answers of another model, table, prompt style or decoding have
another fingerprint and so another file: they are never mixed, and nothing has to be deleted by hand.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import DataError

logger = logging.getLogger(__name__)

FINGERPRINT_DIGITS = 16
"""Hexadecimal digits kept of the SHA-256: 64 bits, chance collisions are out of reach."""


def fingerprint(facts: Mapping[str, Any]) -> str:
    """Short name of a run configuration; equal facts (JSON values) give equal names."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:FINGERPRINT_DIGITS]


class Journal:
    """Answers of one run configuration; this process appends to the file of its rank and reads those of all."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], rank: int):
        self._folder, self._facts = folder, dict(facts)
        self._name = fingerprint(facts)
        self._path = folder / f"{self._name}.rank{rank}.jsonl"
        self._file = None

    def read(self) -> dict[int | str, str]:
        """Answers of earlier runs with this fingerprint, of every rank that wrote into this folder.

        A last line that a killed run left unfinished is ignored. Raises DataError for any other damaged line, and for
        a file whose first line does not hold this run's facts.
        """
        answers: dict[int | str, str] = {}
        for path in sorted(self._folder.glob(f"{self._name}.rank*.jsonl")):
            lines = path.read_bytes().split(b"\n")
            if lines.pop():
                logger.warning("%s: the last line is unfinished (a killed run); it is ignored", path)
            for number, line in enumerate(lines, start=1):
                record = _parse(line, path, number)
                if number == 1:
                    self._check_facts(record, path)
                else:
                    answers[record["index"]] = record["prediction"]
        return answers

    def append(self, index: int | str, prediction: str) -> None:
        """Write one answer and hand it to the operating system at once."""
        self._open()
        self._write({"index": index, "prediction": prediction})

    def close(self) -> None:
        """Close the file; a later append opens it again."""
        if self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):  # what could not be flushed was reported when it was written
                file.close()

    def _open(self) -> None:
        if self._file is not None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("ab")
        end = _end_of_last_line(self._path)
        self._file.truncate(end)
        if end == 0:
            self._write({"facts": self._facts})

    def _write(self, record: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(record, ensure_ascii=True).encode("ascii") + b"\n")
            self._file.flush()
        except OSError as error:
            raise DataError(
                f"cannot write {self._path}: {error.strerror}. The answers before are kept: make room and start the "
                "same command again, it goes on there."
            ) from error

    def _check_facts(self, record: Mapping[str, Any], path: Path) -> None:
        if record.get("facts") != json.loads(json.dumps(self._facts)):
            raise DataError(f"{path}: its first line is not that of this run; the file was changed. Move it away.")


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}, line {number} is damaged: {error}. Move the file away to answer again.") from error
    needed = {"facts"} if number == 1 else {"index", "prediction"}
    if not isinstance(record, dict) or not needed <= set(record):
        raise DataError(f"{path}, line {number} is no journal line; found {line[:80]!r}. Move the file away.")
    return record


def _end_of_last_line(path: Path) -> int:
    """Bytes up to and with the last line feed."""
    block = 65536
    with path.open("rb") as file:
        position = file.seek(0, os.SEEK_END)
        while position > 0:
            start = max(0, position - block)
            file.seek(start)
            found = file.read(position - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            position = start
    return 0
