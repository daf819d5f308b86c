"""MMMU (Yue et al., CVPR 2024): college-level questions, most of them multiple choice, some open."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluation.benchmarks.mcq._choice import ChoiceReading, MultipleChoice, options_of
from evaluation.scorers import mmmu_open
from evaluation.tsv import Row, Table


@dataclass(frozen=True)
class MMMU(MultipleChoice):
    """Multiple choice, and open questions in the rows without options.

    Strict scoring uses MMMU's own rule for those; VLMEvalKit makes them a choice of the answer and "Other Answers".
    """

    def is_open(self, cells: Mapping[str, str]) -> bool:
        """True for a row without options."""
        return not options_of(cells)

    def read_strict(self, table: Table, rows: Sequence[Row], answers: Sequence[str]) -> list[ChoiceReading]:
        """Letters, and for open questions only whether the answer is right."""
        readings = super().read_strict(table, rows, answers)
        return [
            _open_reading(reading, answer) if self.is_open(reading.view) else reading
            for reading, answer in zip(readings, answers, strict=True)
        ]

    def kit_question(self, options: dict[str, str], truth: str | None) -> tuple[dict[str, str], str | None]:
        """Without an option A, the answer's text becomes option A."""
        return mmmu_open.kit_options(options, truth or "nan")


def _open_reading(reading: ChoiceReading, answer: str) -> ChoiceReading:
    hit = int(mmmu_open.strict_correct(reading.view["answer"], answer))
    return ChoiceReading(
        reading.row, reading.view, None, hit, "open question, compared by MMMU's own rule", is_open=True
    )


BENCHMARKS = (MMMU("MMMU_DEV_VAL", aliases=("MMMU", "MMMU_VAL")), MMMU("MMMU_TEST"))
