"""Reads what training and evaluation wrote."""

import base64
import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

import openpyxl
from PIL import Image


@dataclass(frozen=True)
class Answer:
    """One held-out question with what the model said."""

    image: Image.Image
    question: str
    options: dict[str, str]
    answer: str
    """The right letter."""

    prediction: str
    hit: bool


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, one per step; a last line cut off by a kill is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def loss_drop(metrics: list[dict]) -> tuple[float, float]:
    """Mean loss of the first and of the last tenth of the steps."""
    losses = [record["loss"] for record in metrics]
    share = max(1, len(losses) // 10)
    return sum(losses[:share]) / share, sum(losses[-share:]) / share


def read_answers(predictions: Path, table: Path) -> list[Answer]:
    """Joins <model>_<set>.xlsx with the images of the TSV, in the TSV's order."""
    header, *rows = openpyxl.load_workbook(predictions, read_only=True).active.values
    said = {str(record["index"]): record for record in (dict(zip(header, row, strict=True)) for row in rows)}
    csv.field_size_limit(1 << 24)
    with table.open(newline="", encoding="utf-8") as stream:
        questions = list(csv.DictReader(stream, delimiter="\t"))
    return [
        Answer(
            image=Image.open(io.BytesIO(base64.b64decode(row["image"]))).convert("L"),
            question=row["question"],
            options={letter: row[letter] for letter in "ABCD"},
            answer=row["answer"],
            prediction=str(said[row["index"]]["prediction"]),
            hit=bool(said[row["index"]]["hit"]),
        )
        for row in questions
    ]
