"""MMBench (Liu et al., ECCV 2024): each question in all rotations of its options, right only if all are right."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluation.benchmark import Mode
from evaluation.benchmarks.mcq._choice import ChoiceReading, MultipleChoice, options_of
from evaluation.judge_protocol import Judge
from evaluation.kit_view import views_of_kit
from evaluation.prompts import LETTER_INSTRUCTION, LETTER_INSTRUCTION_CN
from evaluation.report import Report, mean_units
from evaluation.scorers.circular import ROTATION_OFFSET, kit_group, question_of, strict_group
from evaluation.tsv import Table, typed_indices
from mindspeed_mm.errors import DataError

_NO_OPTION = ("", "nan", "none")
"""Option texts, in any case, at which LLaVA's script stops reading options."""


@dataclass(frozen=True)
class MMBench(MultipleChoice):
    """Circular multiple choice. Rows of one question are those whose index is equal modulo 1,000,000."""

    rotations: bool | None = True
    chinese: bool = False
    """Whether LLaVA's script is called with --lang cn."""
    submission = "mmbench"

    def check(self, table: Table) -> None:
        """Raise DataError also for an index that is no integer."""
        super().check(table)
        if not all(isinstance(row.index, int) for row in table.rows):  # one that is none makes texts of all
            all_indices = [str(row.index) for row in table.rows] + [str(index) for index in table.dropped]
            wrong = next(text for text in all_indices if not isinstance(typed_indices([text])[0], int))
            raise DataError(
                f"{table.path}: {self.name} finds the rotations of a question by the index, question + k * "
                f"{ROTATION_OFFSET}; found the index {wrong}, which is no integer. Number the rows so."
            )

    def official_texts(self, table: Table) -> dict[int | str, str]:
        """LLaVA's model_vqa_mmbench --single-pred-prompt, which stops at the first empty option and so loses some."""
        views = views_of_kit(table)
        texts = {}
        for row in table.rows:
            view = views[row.index]
            lines = [view["hint"]] if view.get("hint", "").lower() not in _NO_OPTION else []
            lines.append(view.get("question", "nan"))
            for letter in "ABCD":
                if view.get(letter, "").lower() in _NO_OPTION:
                    break
                lines.append(f"{letter}. {view[letter]}")
            lines.append(LETTER_INSTRUCTION_CN if self.chinese else LETTER_INSTRUCTION)
            texts[row.index] = "\n".join(lines)
        return texts

    def score(
        self,
        table: Table,
        predictions: Mapping[int | str, str],
        mode: Mode,
        missing: int = 0,
        judge: Judge | None = None,
    ) -> Report:
        """As for multiple choice; also notes how many questions lack rotations (a first part of the table was asked),
        which strict scoring counts as wrong."""
        report = super().score(table, predictions, mode, missing, judge)
        options = {row.index: len(options_of(row.cells)) for row in table.rows}
        asked = Counter(question_of(index) for index in report.rows)
        short = sum(asked[index] < options[index] for index in report.rows if index < ROTATION_OFFSET)
        if not short:
            return report
        return dataclasses.replace(report, notes={**report.notes, "questions_without_all_rotations": short})

    def combine(
        self, readings: Sequence[ChoiceReading], mode: Mode
    ) -> tuple[list[Mapping[str, str]], list[int], dict[str, tuple[float, float]]]:
        """One view and hit per question whose first form was asked."""
        questions: dict[int, list[ChoiceReading]] = {}
        for reading in sorted(readings, key=lambda reading: reading.row.index):
            questions.setdefault(question_of(reading.row.index), []).append(reading)
        questions = {name: own for name, own in questions.items() if own[0].row.index == name}
        hits = [_hit(own, mode) for own in questions.values()]
        views = [own[0].view for own in questions.values()]
        return views, hits, mean_units(dict(zip(questions, hits, strict=True)))


def _hit(readings: Sequence[ChoiceReading], mode: Mode) -> int:
    letters = [reading.letter for reading in readings]
    truths = [letter if reading.hit else f"not {letter}" for letter, reading in zip(letters, readings, strict=True)]
    if mode == "compat":
        return kit_group(letters, truths) or 0
    return strict_group(letters, truths, len(options_of(readings[0].view)))


BENCHMARKS = (
    MMBench("MMBench_DEV_EN", aliases=("MMBench",)),
    MMBench("MMBench_TEST_EN"),
    MMBench("MMBench_DEV_CN", aliases=("MMBench_CN",), chinese=True),
    MMBench("MMBench_TEST_CN", chinese=True),
    MMBench("MMBench_DEV_EN_V11"),
    MMBench("MMBench_TEST_EN_V11"),
    MMBench("MMBench_DEV_CN_V11", chinese=True),
    MMBench("MMBench_TEST_CN_V11", chinese=True),
)
