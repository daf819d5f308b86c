"""POPE (Li et al., EMNLP 2023): is an object in the image? F1 over three sets of questions.

Two forms are read: VLMEvalKit's TSV, whose column category is a comma list of sets, and the three original files of
JSON lines (or LLaVA's question file), for which compat is LLaVA's and POPE's own script.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from evaluation.benchmarks import Mode
from evaluation.benchmarks.yesno._yesno import Combined, Reading, YesNo, refuse_near_names
from evaluation.report import Cell, mean
from evaluation.scorers import yesno
from evaluation.tsv import Table

MEAN = "mean_of_three"
_RATES = {name: name for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")}
_KIT_RATES = {"Overall": "f1", "acc": "accuracy", "precision": "precision", "recall": "recall"}
"""Columns of the two tables, and the rates they hold."""


@dataclass(frozen=True)
class POPE(YesNo):
    """Yes-no questions in sets; a question may be in several."""

    def check(self, table: Table) -> None:
        """Raise DataError also for a set whose name differs from POPE's by case or spaces only."""
        super().check(table)
        refuse_near_names(table, yesno.POPE_SETS, self.name)

    def strict_reader(self) -> Callable[[str], str]:
        """Unreadable answers are wrong, never a yes."""
        return yesno.pope_strict_answer

    def compat_reader(self, table: Table) -> Callable[[str], str]:
        """LLaVA's rule for the original files, VLMEvalKit's for its table."""
        return yesno.pope_llava_answer if table.is_json_lines else yesno.kit_answer

    def combine(self, readings: Sequence[Reading], mode: Mode, table: Table) -> Combined:
        """Rates per set and their mean; VLMEvalKit's table x100, whose headline is the F1 of all repeated rows."""
        names = _ordered({name for reading in readings for name in _sets(reading.view)})
        by_set = {name: [reading for reading in readings if name in _sets(reading.view)] for name in names}
        if mode == "compat" and not table.is_json_lines:
            found = yesno.kit_pope_table([_kit_row(reading) for reading in readings])
            repeated = {"Overall": [reading for own in by_set.values() for reading in own], **by_set}
            cells = {name: _rates(own, _KIT_RATES, 100.0) for name, own in repeated.items()}
            units = {str(r.row.index): _counts(r, len(_sets(r.view))) for r in readings}
            return Combined(found, units, cells, "F1 of all rows", "mean F1", 100.0)
        found = {name: yesno.pope_metrics((r.said, r.truth) for r in own) for name, own in by_set.items()}
        cells = {name: _rates(own, _RATES, 1.0) for name, own in by_set.items()}
        if len(names) > 1:
            title = MEAN if names == list(yesno.POPE_SETS) else "mean"
            found[title] = {rate: mean(found[name][rate] for name in names) for rate in _RATES}
            cells[title] = _mean_rates(readings, names)
        units = {
            str(r.row.index): [n for name in names for n in _counts(r, int(name in _sets(r.view)))] for r in readings
        }
        return Combined(found, units, cells, "mean F1 of the sets", "mean F1", 1.0)


def _part_and_whole(reading: Reading, rate: str) -> tuple[int, int]:
    """What a row adds to a rate's numerator and denominator."""
    tp, fp, fn = _counts(reading, 1)
    return {
        "accuracy": (reading.hit, 1),
        "precision": (tp, tp + fp),
        "recall": (tp, tp + fn),
        "f1": (2 * tp, 2 * tp + fp + fn),
        "yes_ratio": (int(reading.said.lower() == "yes"), 1),
    }[rate]


def _rates(readings: Sequence[Reading], rates: Mapping[str, str], scale: float) -> dict[str, Cell]:
    return {
        column: Cell([_part_and_whole(reading, rate) for reading in readings], scale=scale)
        for column, rate in rates.items()
    }


def _mean_rates(readings: Sequence[Reading], names: Sequence[str]) -> dict[str, Cell]:
    """The mean over sets of each rate: a row has a pair of numbers for each set, zeros for those it is not in."""
    return {
        rate: Cell(
            [
                [n for name in names for n in (_part_and_whole(r, rate) if name in _sets(r.view) else (0, 0))]
                for r in readings
            ],
            "mean of ratios",
        )
        for rate in _RATES
    }


def _sets(view: Mapping[str, str]) -> list[str]:
    return (view.get("category") or "all").split(",")


def _ordered(names: set[str]) -> list[str]:
    known = [name for name in yesno.POPE_SETS if name in names]
    return known + sorted(names - set(known))


def _counts(reading: Reading, times: int) -> tuple[int, int, int]:
    """True positives, false positives, false negatives."""
    yes, right = reading.said.lower() == "yes", reading.truth == "yes"
    return times * (yes and right), times * (yes and not right), times * (right and not yes)


def _kit_row(reading: Reading) -> dict[str, str | bool]:
    return {
        "category": ",".join(_sets(reading.view)),
        "answer": reading.truth.capitalize(),
        "extracted": reading.said,
        "score": bool(reading.hit),
    }


BENCHMARK = POPE("POPE")
