"""Answers that are already there, as an engine: scores of another tool's predictions go through the same reports."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evaluation.engine import EvaluationRequest
from evaluation.predictions import match_predictions
from evaluation.tsv import Table


class RecordedAnswers:
    """An evaluation.engine.Engine that reads a file of answers, for example VLMEvalKit's <model>_<dataset>.xlsx."""

    def __init__(self, path: str | Path, table: Table, *, by_order: bool = False):
        self._answers, _ = match_predictions(path, table, by_order=by_order)
        text = json.dumps([[index, answer] for index, answer in self._answers.items()])
        self._facts = {"predictions": Path(path).name, "predictions_sha256": hashlib.sha256(text.encode()).hexdigest()}

    def generate(self, requests: Sequence[EvaluationRequest], batch_size: int) -> Iterator[tuple[int | str, str]]:
        """The recorded answers of the rows asked for."""
        for request in requests:
            yield request.id, self._answers[request.id]

    def describe(self) -> dict[str, Any]:
        """Name of the file and of the answers in it."""
        return self._facts
