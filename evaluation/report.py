"""Scores of one benchmark run: per row, per split and category, with a bootstrap interval."""

import csv
import functools
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from evaluation.drawing import DrawnBoxes
from evaluation.statistics import evaluate, interval


class RowScore(NamedTuple):
    """Score of one answer. Fields are also found by name, as in the JSON form: row["hit"]."""

    extracted: str | None
    """What the answer was taken to say; None (or VLMEvalKit's "Z", "Unknown") where nothing could be read."""
    hit: float
    """0 or 1, or a score between them."""
    log: str = ""

    @property
    def score(self) -> float:
        """The same as `hit`; VLMEvalKit's word for open answers."""
        return self.hit

    def __getitem__(self, key):
        return getattr(self, key) if isinstance(key, str) else tuple.__getitem__(self, key)


class Rows(dict):
    """Row scores by index; 7 and "7" find the same row."""

    def __missing__(self, index):
        other = str(index) if isinstance(index, int) else int(index) if str(index).isdecimal() else index
        if other == index or other not in self:
            raise KeyError(index)
        return self[other]


class Cell(NamedTuple):
    """What a number of the table is made of, for its interval: units as in Report.units, their statistic, and what
    the statistic is multiplied by to be the table's number."""

    units: Sequence[Sequence[float]]
    statistic: str = "mean"
    scale: float = 1.0


@dataclass(frozen=True)
class Report:
    """Result of scoring. `table` is {line: {column: value}} on the scale of the public scorer (0..`scale`); nan where
    a line has no such row."""

    benchmark: str
    mode: str
    table: dict[str, dict[str, float]]
    rows: Rows
    units: dict[str, Sequence[float]]
    """What is drawn together in a bootstrap, by name: numbers whose sums give the metric (evaluation.statistics)."""
    unparsed: int
    """Answers from which nothing could be read; they count as wrong."""
    metric: str = "accuracy"
    statistic: str = "mean"
    scale: float = 1.0
    dropped: int = 0
    """Rows of the file without an image, which are not part of the benchmark."""
    missing: int = 0
    """Rows without an answer; they are left out of the scores."""
    cells: Mapping[str, Mapping[str, Cell]] = field(default_factory=dict)
    """What the rates of `table` are made of, by line and column; counts are not among them."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What a reader of the numbers should know, such as how many answers a judge read."""
    attachments: Mapping[str, Any] = field(default_factory=dict)
    """Further files in the benchmark's own form, by the end of their name: JSON, or lines of it ("name.jsonl")."""
    boxes: Mapping[Any, DrawnBoxes] = field(default_factory=dict)
    """Boxes of rows, which the page draws, by index."""

    @property
    def n(self) -> int:
        """Number of scored rows."""
        return len(self.rows)

    @functools.cached_property
    def overall(self) -> float:
        """The metric over all rows: 0..1, but for MME, whose points are kept (0..2000)."""
        return evaluate(list(self.units.values()), self.statistic) if self.units else math.nan

    @functools.cached_property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of `overall`."""
        return interval(list(self.units.values()), self.statistic) if self.units else (math.nan, math.nan)

    @functools.cached_property
    def table_intervals(self) -> dict[str, dict[str, tuple[float, float]]]:
        """95 % bootstrap intervals of the table's rates, on the table's scale."""
        return {
            line: {
                name: tuple(cell.scale * end for end in interval(cell.units, cell.statistic))
                for name, cell in columns.items()
            }
            for line, columns in self.cells.items()
        }

    def to_csv(self) -> str:
        """The table: one line per split, comma separated, all cells quoted, rates as fractions 0..1."""
        columns = list(dict.fromkeys(name for row in self.table.values() for name in row))
        text = io.StringIO()
        writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow(["split", *columns])
        for split, row in self.table.items():
            writer.writerow([split, *(_csv_cell(row.get(name, math.nan), self.scale) for name in columns)])
        return text.getvalue()

    def to_json(self) -> dict[str, Any]:
        """JSON form; a line without rows of a category has null there. `units` lets two runs be compared."""
        table = {
            split: {name: None if math.isnan(value) else value for name, value in row.items()}
            for split, row in self.table.items()
        }
        return {
            "mode": self.mode,
            "metric": self.metric,
            "overall": None if math.isnan(self.overall) else self.overall,
            "interval_95": [None if math.isnan(end) else end for end in self.interval],
            "interval_method": "percentile bootstrap",
            "n": self.n,
            "unparsed": self.unparsed,
            "dropped_without_image": self.dropped,
            "missing_answers": self.missing,
            **({"notes": dict(self.notes)} if self.notes else {}),
            "table_scale": self.scale,
            "table": table,
            "table_intervals_95": {
                line: {name: list(ends) for name, ends in columns.items()}
                for line, columns in self.table_intervals.items()
            },
            "statistic": self.statistic,
            "units": {name: list(numbers) for name, numbers in self.units.items()},
        }


def _csv_cell(value: float, scale: float) -> str:
    return "" if math.isnan(value) else repr(value if scale == 1 else value / scale)


def mean_units(scores: Mapping[Any, float]) -> dict[str, tuple[float, float]]:
    """Units of the statistic "mean": one per question."""
    return {str(name): (float(score), 1.0) for name, score in scores.items()}


def mean_cell(scores: Iterable[float], scale: float = 1.0) -> Cell:
    """The mean of some rows' scores as a cell."""
    return Cell([(float(score), 1.0) for score in scores], scale=scale)


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean, nan of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan
