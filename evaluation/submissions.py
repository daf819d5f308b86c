"""Files in the form that a benchmark's own test server or tool takes."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evaluation.outputs import check_folder, replace
from evaluation.scorers.exact import gqa_export
from evaluation.scorers.vqa import m4c_normalise
from evaluation.sheet import write_sheet
from evaluation.tsv import Row, Table

MMBENCH_FILE = "mmbench_result.xlsx"
"""Name that the server's page shows; in a folder of its own for each model and set."""
MMBENCH_DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
"""Columns that LLaVA's convert_mmbench_for_submission leaves out."""
IDENTIFIERS = ("question_id", "questionId", "id")
"""Columns with the server's number of a question; without one it is the index."""


def write_submission(
    folder: Path, stem: str, form: str | None, table: Table, answers: Mapping[int | str, str]
) -> dict[str, Path]:
    """Write the submission file of a benchmark; returns its path as {"submission": path}, or nothing for form None."""
    if form is None:
        return {}
    rows = [row for row in table.rows if row.index in answers]
    if form == "mmbench":
        path = folder / f"{stem}_submission" / MMBENCH_FILE
        check_folder(path.parent)
        columns = [name for name in table.columns if name not in MMBENCH_DROPPED]
        cells = [
            [*(row.index if name == "index" else row.cells[name] for name in columns), answers[row.index]]
            for row in rows
        ]
        replace(path, lambda target: write_sheet(target, [*columns, "prediction"], cells))
    else:
        path = folder / f"{stem}_submission.json"
        records = [_JSON_FORMS[form](row, answers[row.index]) for row in rows]
        text = json.dumps(records, ensure_ascii=False) + "\n"
        replace(path, lambda target: target.write_text(text, encoding="utf-8"))
    return {"submission": path}


def _identifier(row: Row) -> int | str:
    """The server's number of the question."""
    value = next((row.cells[name] for name in IDENTIFIERS if row.cells.get(name)), row.index)
    return int(value) if str(value).isdecimal() else value


def _image(row: Row) -> str:
    """Name of the image's file."""
    return row.cells.get("image_path", str(row.index)).rsplit("/", 1)[-1]


_JSON_FORMS: dict[str, Callable[[Row, str], dict[str, Any]]] = {
    "vqa": lambda row, answer: {"question_id": _identifier(row), "answer": m4c_normalise(answer)},
    "vizwiz": lambda row, answer: {"image": _image(row), "answer": m4c_normalise(answer)},
    "docvqa": lambda row, answer: {"questionId": _identifier(row), "answer": answer.strip()},
    "gqa": lambda row, answer: {"questionId": str(_identifier(row)), "prediction": gqa_export(answer)},
}
"""VQAv2 and VizWiz take answers that went through the VQA normaliser, as LLaVA's scripts do."""
