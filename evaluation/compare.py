"""Two finished evaluations of one benchmark: is their difference more than chance, and which rows flipped."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.statistics import RESAMPLES, SEED, STATISTICS
from mindspeed_mm.errors import DataError

MAX_REPORT_BYTES = 2**30
_MUST_AGREE = ("benchmark", "table_sha256")


@dataclass(frozen=True)
class Comparison:
    """B against A in one scoring mode, over the units (questions) that both runs scored."""

    mode: str
    metric: str
    units: int
    first: float
    second: float
    interval: tuple[float, float]
    """95 % paired bootstrap interval of second - first."""
    p_bootstrap: float
    """Two-sided: twice the smaller share of resamples on either side of no difference, at most 1."""
    p_mcnemar: float | None
    """Exact two-sided McNemar test on right and wrong questions; None for metrics that are not 0 or 1 a question."""
    flipped: list[dict[str, Any]]
    """Rows whose score differs: index, question, truth, both answers, and for either run reading and score."""

    @property
    def difference(self) -> float:
        """second - first."""
        return self.second - self.first


def compare_reports(first: str | Path, second: str | Path, mode: str = "strict") -> Comparison:
    """Compare two report.json files. Raises DataError for unreadable ones, or of different benchmarks or tables."""
    a, b = read_report(Path(first)), read_report(Path(second))
    for key in _MUST_AGREE:
        if a[key] != b[key]:
            raise DataError(
                f"the two runs cannot be compared: {key} is {a[key]} in {first} and {b[key]} in {second}; "
                "expected the same questions."
            )
    scores = []
    for path, report in ((first, a), (second, b)):
        if mode not in report["scores"]:
            raise DataError(f"{path} has no {mode} scores; found {', '.join(report['scores']) or 'none'}.")
        scores.append(report["scores"][mode])
    if scores[0]["metric"] != scores[1]["metric"]:
        raise DataError(
            f"the two runs cannot be compared: {first} measures {scores[0]['metric']} and {second} "
            f"{scores[1]['metric']}; score both with a judge, or both without."
        )
    left, right = (score["units"] for score in scores)
    common = [name for name in left if name in right]
    if not common or len(left[common[0]]) != len(right[common[0]]):
        raise DataError(f"{first} and {second} have no questions in common; evaluate the same rows.")
    values = np.asarray([[left[name], right[name]] for name in common], dtype=np.float64)
    statistic = STATISTICS[scores[0]["statistic"]]
    generator = np.random.default_rng(SEED)
    count = len(values)
    weights = (np.bincount(generator.integers(0, count, count), minlength=count) for _ in range(RESAMPLES))
    sums = np.stack([np.tensordot(weight, values, axes=1) for weight in weights])
    differences = statistic(sums[:, 1]) - statistic(sums[:, 0])
    low, high = np.percentile(differences, (2.5, 97.5))
    both = statistic(values.sum(axis=0))
    tail = min(float(np.mean(differences <= 0)), float(np.mean(differences >= 0)))
    return Comparison(
        mode=mode,
        metric=scores[0]["metric"],
        units=count,
        first=float(both[0]),
        second=float(both[1]),
        interval=(float(low), float(high)),
        p_bootstrap=min(1.0, 2 * tail),
        p_mcnemar=_mcnemar_of(values) if scores[0]["statistic"] == "mean" else None,
        flipped=_flipped(a["rows"], b["rows"], mode),
    )


def _mcnemar_of(values: np.ndarray) -> float | None:
    hits = values[:, :, 0]
    if not np.isin(hits, (0.0, 1.0)).all():
        return None
    return mcnemar(
        int(((hits[:, 0] == 1) & (hits[:, 1] == 0)).sum()), int(((hits[:, 0] == 0) & (hits[:, 1] == 1)).sum())
    )


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p value: `lost` questions are right in the first run only, `won` in the second only."""
    total, fewer = lost + won, min(lost, won)
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, float(2 * tail / 2**total)) if total <= 1000 else _normal_tail(lost, won)


def _normal_tail(lost: int, won: int) -> float:
    """The normal approximation with continuity correction, for counts where the exact sum is slow."""
    z = max(0.0, abs(lost - won) - 1) / math.sqrt(lost + won)
    return math.erfc(z / math.sqrt(2))


def _flipped(first: list[dict], second: list[dict], mode: str) -> list[dict[str, Any]]:
    others = {row["index"]: row for row in second}
    flipped = []
    for row in first:
        other = others.get(row["index"])
        if other is not None and row[mode][1] != other[mode][1]:
            flipped.append(
                {
                    "index": row["index"],
                    "question": row["question"],
                    "truth": row.get("truth", ""),
                    "predictions": [row["prediction"], other["prediction"]],
                    "first": row[mode],
                    "second": other[mode],
                }
            )
    return flipped


def read_report(path: Path) -> dict[str, Any]:
    """The report.json of a finished evaluation. Raises DataError when it is none."""
    try:
        if path.stat().st_size > MAX_REPORT_BYTES:
            raise DataError(f"{path} is larger than {MAX_REPORT_BYTES} bytes; expected a report.json.")
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; expected a <model>_<set>_report.json.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}; expected a <model>_<set>_report.json.") from error
    needed = {"model", "scores", "rows", *_MUST_AGREE}
    if not isinstance(report, dict) or not needed <= set(report):
        raise DataError(
            f"{path} is no report of an evaluation; expected a JSON object with {', '.join(sorted(needed))}."
        )
    scores, rows = report["scores"], report["rows"]
    whole = isinstance(scores, dict) and all(
        isinstance(score, dict) and score.keys() >= {"metric", "statistic", "units", "overall"}
        for score in scores.values()
    )
    if not whole or not isinstance(rows, list) or not all(isinstance(row, dict) and "index" in row for row in rows):
        raise DataError(f"{path} has damaged scores or rows; evaluate again, the answers are in the journal beside it.")
    return report
