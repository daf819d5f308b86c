"""POPE (Li et al., EMNLP 2023): is an object in the image? F1 over three sets of questions.

Two forms are read: VLMEvalKit's TSV, whose column category is a comma list of sets, and the three original files of
JSON lines (or LLaVA's question file), for which compat is LLaVA's and POPE's own script.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from evaluation.benchmark import Mode
from evaluation.benchmarks.yesno._yesno import YesNo, YesNoReading
from evaluation.report import mean
from evaluation.scorers import yesno
from evaluation.tsv import Table

MEAN = "mean_of_three"
_RATES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


@dataclass(frozen=True)
class POPE(YesNo):
    """Yes-no questions in sets; a question may be in several."""

    def strict_reader(self) -> Callable[[str], str]:
        """Unreadable answers are wrong, never a yes."""
        return yesno.pope_strict_answer

    def compat_reader(self, table: Table) -> Callable[[str], str]:
        """LLaVA's rule for the original files, VLMEvalKit's for its table."""
        return yesno.pope_llava_answer if table.is_json_lines else yesno.kit_answer

    def combine(
        self, readings: Sequence[YesNoReading], mode: Mode, table: Table
    ) -> tuple[dict[str, dict[str, float]], dict[str, Sequence[float]], str, str, float]:
        """Rates per set and their mean; VLMEvalKit's table x100, whose headline is the F1 of all repeated rows."""
        names = _ordered({name for reading in readings for name in _sets(reading.view)})
        if mode == "compat" and not table.is_json_lines:
            found = yesno.kit_pope_table([_kit_row(reading) for reading in readings])
            units = {str(r.row.index): _counts(r, len(_sets(r.view))) for r in readings}
            return found, units, "F1 of all rows", "mean F1", 100.0
        found = {
            name: yesno.pope_metrics((r.said, r.truth) for r in readings if name in _sets(r.view)) for name in names
        }
        if len(names) > 1:
            found[MEAN if names == list(yesno.POPE_SETS) else "mean"] = {
                rate: mean(found[name][rate] for name in names) for rate in _RATES
            }
        units = {
            str(r.row.index): [n for name in names for n in _counts(r, int(name in _sets(r.view)))] for r in readings
        }
        return found, units, "mean F1 of the sets", "mean F1", 1.0


def _sets(view: Mapping[str, str]) -> list[str]:
    return (view.get("category") or "all").split(",")


def _ordered(names: set[str]) -> list[str]:
    known = [name for name in yesno.POPE_SETS if name in names]
    return known + sorted(names - set(known))


def _counts(reading: YesNoReading, times: int) -> tuple[int, int, int]:
    """True positives, false positives, false negatives."""
    yes, right = reading.said.lower() == "yes", reading.truth == "yes"
    return times * (yes and right), times * (yes and not right), times * (right and not yes)


def _kit_row(reading: YesNoReading) -> dict[str, str | bool]:
    return {
        "category": ",".join(_sets(reading.view)),
        "answer": reading.truth.capitalize(),
        "extracted": reading.said,
        "score": bool(reading.hit),
    }


BENCHMARK = POPE("POPE")
