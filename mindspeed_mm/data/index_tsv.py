"""A huge JSON index of images ([{"url", "caption"}, ...]) as TSV files that img2dataset takes, in constant memory.

A folder gets `00000.tsv`, `00001.tsv`, ... of a fixed number of rows, each written beside and renamed. `progress.json`
says after each how far the index was read, so that the same command goes on where it was cut short.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mindspeed_mm.data.progress import progress_bar
from mindspeed_mm.data.record_stream import record_stream
from mindspeed_mm.errors import DataError

PROGRESS = "progress.json"
COLUMNS = ("url", "caption")
ROWS = 1_000_000
SPACE = re.compile(r"\s+")


def index_to_tsv(
    source: str | Path, folder: str | Path, *, columns: Sequence[str] = COLUMNS, rows: int = ROWS
) -> dict[str, int]:
    """Write the index as TSV files; returns {"records", "files"}. A folder that is complete is left as it is.

    Args:
        source: a JSON list or JSONL of objects.
        folder: of the TSV files; it may hold what an earlier call has left, of the same source and settings.
        columns: keys of the objects, in the order of the columns, which the first line names. White space inside a
            value becomes one space.
        rows: of each file.

    Raises:
        DataError: a source that cannot be read, a record without one of the keys, a folder of other data.
    """
    source, folder = Path(source), Path(folder)
    try:
        size = source.stat().st_size
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"bytes": size, "columns": list(columns), "rows": rows}
        state = _state(folder, settings)
        with source.open("rb") as file, progress_bar(f"converting {source.name}", size) as advance:
            advance(state["position"])
            while not state["done"]:
                before = state["position"]
                state = _write_file(file, folder, state, source)
                _write(folder / PROGRESS, json.dumps(state))
                advance(state["position"] - before)
    except OSError as error:
        raise DataError(f"{error.filename or source}: {error.strerror}; correct the path, or make room.") from error
    return {"records": state["records"], "files": state["files"]}


def _state(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """How far an earlier call came; the beginning where there was none."""
    path = folder / PROGRESS
    if not path.is_file():
        if left := next(folder.glob("*.tsv"), None):
            raise DataError(
                f"{folder} holds {left.name} and no {PROGRESS}; expected an empty folder. Give another one."
            )
        return settings | {"position": 0, "records": 0, "files": 0, "done": False}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        found = {key: state[key] for key in settings}
        known = all(type(state[key]) is int for key in ("position", "records", "files"))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); remove the folder and convert anew.") from error
    if found != settings or not known:
        raise DataError(
            f"{path}: the folder was begun with {found}; found {settings} now. Give another folder, or the same source "
            "and settings."
        )
    return state


def _write_file(file: BinaryIO, folder: Path, state: dict[str, Any], source: Path) -> dict[str, Any]:
    """One more TSV file; returns the state behind it."""
    columns, number, position = state["columns"], state["records"], state["position"]
    path = folder / f"{state['files']:05d}.tsv"
    beside, left = path.with_name(f".{path.name}.part"), state["rows"]
    with beside.open("w", encoding="utf-8", newline="\n") as out:
        out.write("\t".join(columns) + "\n")
        for text, behind in record_stream(file, source, state["position"], number):
            out.write("\t".join(_values(text, columns, source, number)) + "\n")
            number, left, position = number + 1, left - 1, behind
            if left == 0:
                break
        out.flush()
        os.fsync(out.fileno())
    done = left > 0
    if number == state["records"]:
        beside.unlink()
        if number == 0:
            raise DataError(f"{source} holds no records; expected objects with {', '.join(columns)}.")
        return state | {"done": True}
    beside.replace(path)
    return state | {"position": position, "records": number, "files": state["files"] + 1, "done": done}


def _values(text: bytes, columns: Sequence[str], source: Path, number: int) -> Iterator[str]:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise DataError(f"{source}: record {number} is not JSON ({error}). Correct the file.") from error
    for key in columns:
        value = record.get(key) if isinstance(record, dict) else None
        if not isinstance(value, str | int):
            raise DataError(
                f"{source}: record {number} has {key} {value!r:.60}; expected a text. Name its keys with --columns, or "
                "correct the file."
            )
        yield SPACE.sub(" ", str(value)).strip()


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
