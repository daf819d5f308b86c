"""The files of a finished evaluation: <model>_<set>.xlsx, _acc.csv, _report.json and _report.html."""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evaluation.page import render_page
from evaluation.report import Report
from evaluation.results import PAGE_SUFFIX, REPORT_SUFFIX, SHEET_SUFFIX, TABLE_SUFFIX
from evaluation.sheet import is_cut, write_sheet
from evaluation.tsv import Row, Table
from mindspeed_mm.errors import DataError

RESULT_COLUMNS = ("prediction", "extracted", "hit", "log")


def check_output_name(name: str, what: str) -> None:
    """Raise DataError for a name that cannot be a part of a file name."""
    if not name or name.startswith(".") or any(character in name for character in '/\\:*?"<>|\0\n'):
        raise DataError(
            f'{what} is "{name}", which cannot be part of a file name; expected letters, digits, "_", "-" and ".".'
        )


def check_folder(folder: Path) -> None:
    """Create the result folder. Raises DataError when it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError as error:
        raise DataError(f"cannot create the result folder {folder}: {error.strerror}; choose another.") from error
    if not writable:
        raise DataError(f"the result folder {folder} is not writable; choose another or change its permissions.")


def write_outputs(
    folder: Path,
    stem: str,
    table: Table,
    answers: Mapping[int | str, str],
    report: Report | None,
    summary: Mapping[str, Any],
) -> dict[str, Path]:
    """Write the sheet, the accuracy table (with a report only), the JSON report and the page; returns their paths.

    Files are written beside and renamed, so a reader never sees half of one. Equal results give equal bytes.
    """
    rows = [row for row in table.rows if row.index in answers]
    sheet_rows = [_sheet_row(row, table, answers[row.index], report) for row in rows]
    cut = sum(isinstance(cell, str) and is_cut(cell) for row in sheet_rows for cell in row)
    kinds = {"predictions": SHEET_SUFFIX, "report": REPORT_SUFFIX, "page": PAGE_SUFFIX}
    files = {kind: folder / f"{stem}{suffix}" for kind, suffix in kinds.items()}
    columns = [f"{name} (tsv)" if name in RESULT_COLUMNS else name for name in table.columns if name != "image"]
    replace(files["predictions"], lambda path: write_sheet(path, [*columns, *RESULT_COLUMNS], sheet_rows))
    if report is not None:
        files["accuracy"] = folder / f"{stem}{TABLE_SUFFIX}"
        replace(files["accuracy"], lambda path: path.write_text(report.to_csv(), encoding="utf-8"))
        files |= _attach(folder, stem, report.attachments)
    summary = {**summary, "cells_cut_in_sheet": cut, "files": {kind: path.name for kind, path in files.items()}}
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    replace(files["report"], lambda path: path.write_text(text, encoding="utf-8"))
    page = render_page(table, answers, report, summary)
    replace(files["page"], lambda path: path.write_text(page, encoding="utf-8"))
    return files


def _attach(folder: Path, stem: str, attachments: Mapping[str, Any]) -> dict[str, Path]:
    """Write a report's further files; returns their paths."""
    files = {}
    for name, content in attachments.items():
        lines = name.endswith(".jsonl")
        parts = [json.dumps(part, ensure_ascii=False, allow_nan=False) for part in content] if lines else []
        text = "\n".join(parts) if lines else json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        text += "\n"
        files[name.removesuffix(".jsonl")] = folder / (f"{stem}_{name}" if lines else f"{stem}_{name}.json")
        replace(files[name.removesuffix(".jsonl")], lambda path, text=text: path.write_text(text, encoding="utf-8"))
    return files


def _sheet_row(row: Row, table: Table, answer: str, report: Report | None) -> list[str | float | None]:
    cells: list[str | float | None] = [
        row.index if name == "index" else row.cells[name] for name in table.columns if name != "image"
    ]
    score = report.rows[row.index] if report is not None else None
    if score is None:
        return [*cells, answer, None, None, "not scored: the table has no answers"]
    log = f"{score.log}; the prediction is cut in this sheet" if is_cut(answer) else score.log
    return [*cells, answer, score.extracted, score.hit, log]


KEPT = " The answers are kept in the journal: make room and start the same command again."


def replace(path: Path, write: Callable[[Path], Any], kept: str = KEPT) -> None:
    """Let `write` make a file beside `path` and rename it. Raises DataError, with `path` as before and what is `kept`,
    if it cannot."""
    beside = path.with_name(f".{path.name}.part")
    try:
        write(beside)
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise DataError(f"cannot write {path}: {error.strerror}.{kept}") from error
