"""Answers that are already there, as an engine: scores of another tool's predictions go through the same reports."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.engine import EvaluationRequest
from evaluation.predictions import match_predictions
from evaluation.tsv import Table
from mindspeed_mm.errors import DataError


class RecordedAnswers:
    """An evaluation.engine.Engine that reads a file of answers, for example VLMEvalKit's <model>_<dataset>.xlsx."""

    def __init__(self, path: str | Path, table: Table, *, by_order: bool = False, limit: int | None = None):
        """Read the answers of `table`, or of its first `limit` rows.

        Raises DataError as match_predictions does, with what the command line can do about rows without an answer.
        """
        self._answers, _ = match_predictions(path, table, by_order=by_order, allow_missing=True)
        _refuse_unanswered(path, table, limit, self._answers)
        text = json.dumps([[index, answer] for index, answer in self._answers.items()])
        self._facts = {"predictions": Path(path).name, "predictions_sha256": hashlib.sha256(text.encode()).hexdigest()}

    def generate(self, requests: Sequence[EvaluationRequest], batch_size: int) -> Iterator[tuple[int | str, str]]:
        """The recorded answers of the rows asked for."""
        for request in requests:
            yield request.id, self._answers[request.id]

    def describe(self) -> dict[str, Any]:
        """Name of the file and of the answers in it."""
        return self._facts


def _refuse_unanswered(path: str | Path, table: Table, limit: int | None, answers: Mapping[int | str, str]) -> None:
    missing = [number for number, row in enumerate(table.rows[:limit]) if row.index not in answers]
    if missing:
        first = missing[0]
        before = f", or have only the {first} questions before it scored by --limit {first}" if first else ""
        raise DataError(
            f"{path}: {len(missing)} of {len(table.rows[:limit])} rows of {table.path.name} have no answer, for "
            f'example index {table.rows[first].index}; add their answers ("" where a model gave none: it counts as '
            f"wrong){before}."
        )
