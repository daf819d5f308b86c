"""Scores of one benchmark run: per row, per split and category, with an interval."""

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

Z_95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


class RowScore(NamedTuple):
    """Score of one answer. Fields are also found by name, as in the JSON form: row["hit"]."""

    extracted: str | None
    """What the answer was taken to say; None (or VLMEvalKit's "Z") where nothing could be read."""
    hit: int
    log: str = ""

    def __getitem__(self, key):
        return getattr(self, key) if isinstance(key, str) else tuple.__getitem__(self, key)


class Rows(dict):
    """Row scores by index; 7 and "7" find the same row."""

    def __missing__(self, index):
        other = str(index) if isinstance(index, int) else int(index) if str(index).isdecimal() else index
        if other == index or other not in self:
            raise KeyError(index)
        return self[other]


@dataclass(frozen=True)
class Report:
    """Result of scoring. `table` is {split: {column: accuracy 0..1, nan where a split has no such row}}."""

    benchmark: str
    mode: str
    table: dict[str, dict[str, float]]
    rows: Rows
    overall: float
    """Accuracy over all rows, whatever their split."""
    interval: tuple[float, float]
    """95 % Wilson interval of `overall`."""
    unparsed: int
    """Answers from which no option could be read; they count as wrong."""
    dropped: int
    """Rows of the file without a picture, which are not part of the benchmark."""
    missing: int
    """Rows without an answer; they are left out of the scores."""

    @property
    def n(self) -> int:
        """Number of scored rows."""
        return len(self.rows)

    def to_csv(self) -> str:
        """The table in VLMEvalKit's form: one line per split, comma separated, all cells quoted, fractions 0..1."""
        columns = list(dict.fromkeys(name for row in self.table.values() for name in row))
        text = io.StringIO()
        writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow(["split", *columns])
        for split, row in self.table.items():
            writer.writerow([split, *("" if math.isnan(row[name]) else repr(row[name]) for name in columns)])
        return text.getvalue()

    def to_json(self) -> dict[str, Any]:
        """JSON form without the rows; a split without rows of a category has null there."""
        table = {
            split: {name: None if math.isnan(value) else value for name, value in row.items()}
            for split, row in self.table.items()
        }
        return {
            "mode": self.mode,
            "overall": self.overall,
            "interval_95": list(self.interval),
            "interval_method": "Wilson",
            "n": self.n,
            "unparsed": self.unparsed,
            "dropped_without_picture": self.dropped,
            "missing_answers": self.missing,
            "table": table,
        }


def mean(values: Iterable[int]) -> float:
    """Arithmetic mean, nan of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, JASA 1927); (0, 1) when n is 0."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = hits / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
