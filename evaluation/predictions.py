"""Read answers from Python objects, JSON, JSON lines, or a spreadsheet, and match them with the rows of a table."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.tsv import Table, refuse_all
from mindspeed_mm.config.load import parse_json
from mindspeed_mm.errors import ConfigError, DataError

Predictions = str | Path | Mapping[Any, str] | Iterable[Mapping[str, Any]]

MAX_FILE_BYTES = 2**30

INDEX_KEYS = ("index", "question_id", "id")
ANSWER_KEYS = ("prediction", "text", "answer", "pred")
"""Names of the two values in a record of answers: ours and VLMEvalKit's, LLaVA's, POPE's and Shikra's."""


def match_predictions(
    predictions: Predictions, table: Table, *, allow_missing: bool = False, by_order: bool = False
) -> tuple[dict[int | str, str], int]:
    """Answers by index in table order, and the number of rows without one.

    Accepts {index: answer}, a sequence of {"index": ..., "prediction": ...} (or LLaVA's question_id and text, POPE's
    question_id and answer), or a file of these: .json, .jsonl, or .xlsx with columns index and prediction. Answers to
    rows that the table dropped (no image) are left out. `by_order`: records without an index (Shikra's pred) belong
    to the rows in their order.

    Raises DataError: unreadable file, record without the two keys, answer that is not a text, repeated index, index
    that the table does not have, and, unless `allow_missing`, rows without an answer.
    """
    source = str(predictions) if isinstance(predictions, str | Path) else "predictions"
    answers: dict[str, str] = {}
    order = [str(row.index) for row in table.rows] if by_order else []
    pairs, problems = _pairs(predictions, source, order)
    for index, answer in pairs:
        if not isinstance(answer, str):
            problems.append(f"{source}: the answer of index {index} is {answer!r:.200}; expected a text.")
        elif index in answers:
            problems.append(f"{source}: index {index} is answered twice; keep one answer.")
        else:
            answers[index] = answer
    refuse_all(problems)
    dropped = {str(index) for index in table.dropped}
    known = {str(row.index) for row in table.rows}
    extra = [index for index in answers if index not in known and index not in dropped]
    if extra:
        raise DataError(
            f"{source}: {len(extra)} answers belong to no row of {table.path.name}, for example index {extra[0]}; "
            "give the answers of this table."
        )
    missing = [row.index for row in table.rows if str(row.index) not in answers]
    if missing and not allow_missing:
        raise DataError(
            f"{source}: {len(missing)} of {len(table.rows)} rows of {table.path.name} have no answer, for example "
            f"index {missing[0]}; answer them, or score what is there with mm.score(..., allow_missing=True)."
        )
    found = {row.index: answers[str(row.index)] for row in table.rows if str(row.index) in answers}
    if not found:
        raise DataError(f"{source}: no row of {table.path.name} is answered; expected at least one answer.")
    return found, len(missing)


def _pairs(predictions: Predictions, source: str, order: Sequence[str]) -> tuple[list[tuple[str, Any]], list[str]]:
    """(index, answer) of every record, and what is wrong with the records that are none."""
    if isinstance(predictions, str | Path):
        predictions = _read(Path(predictions))
    if isinstance(predictions, Mapping):
        return [(str(index), answer) for index, answer in predictions.items()], []
    pairs, problems = [], []
    for number, record in enumerate(predictions):
        keys = record if isinstance(record, Mapping) else ()
        index_key = next((key for key in INDEX_KEYS if key in keys), None)
        answer_key = next((key for key in ANSWER_KEYS if key in keys), None)
        if answer_key is None or (index_key is None and number >= len(order)):
            own = f" (index {record[index_key]!s:.80})" if index_key is not None else ""
            problems.append(
                f"{source}, record {number}{own}: found {record!r:.200}; expected an object with index and prediction."
            )
            continue
        pairs.append((str(record[index_key]) if index_key else order[number], record[answer_key]))
    return pairs, problems


def _read(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{path} is larger than {MAX_FILE_BYTES} bytes; expected a file of answers.")
        if path.suffix == ".xlsx":
            return _read_sheet(path)
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; expected a file of answers there.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text; expected .json, .jsonl or .xlsx answers.") from error
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"{path}: the form of the answers is not known; expected .json, .jsonl or .xlsx.")
    try:
        if path.suffix == ".jsonl":
            return _read_lines(path, text)
        return parse_json(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}. Correct the file there.") from error
    except ConfigError as error:  # an answer that is given twice
        raise DataError(f"{path}: {error}") from error


def _read_lines(path: Path, text: str) -> list[Any]:
    """One record a line. Raises DataError that names every line that is not JSON."""
    records, problems = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(parse_json(line))
        except (json.JSONDecodeError, RecursionError) as error:
            problems.append(f"{path}, line {number} is not JSON: {error}. Correct the file there.")
        except ConfigError as error:
            problems.append(f"{path}, line {number}: {error}")
    refuse_all(problems)
    return records


def _read_sheet(path: Path) -> list[dict[str, str]]:
    """Rows of the first sheet; numbers are written as VLMEvalKit's reader shows them (14, not 14.0)."""
    import zipfile

    try:
        import openpyxl
    except ModuleNotFoundError as error:
        raise DataError(
            f'{path}: reading a spreadsheet needs openpyxl; pip install "mindspeed-mm[evaluate]".'
        ) from error

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (zipfile.BadZipFile, KeyError, openpyxl.utils.exceptions.InvalidFileException) as error:
        raise DataError(f"{path} is not a spreadsheet: {error}; expected the .xlsx of an evaluation.") from error
    lines = book.worksheets[0].iter_rows(values_only=True)
    header = list(next(lines, ()))
    if "index" not in header or "prediction" not in header:
        raise DataError(f"{path}: found columns {header}; expected index and prediction among them.")
    at = {name: header.index(name) for name in ("index", "prediction")}
    rows = [line + (None,) * (len(header) - len(line)) for line in lines if set(line) - {None}]  # may end early
    return [{name: _cell_text(line[column]) for name, column in at.items()} for line in rows]


def _cell_text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value)
