"""What yes-no benchmarks have in common: columns question and, for scoring, answer (Yes or No)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from evaluation.benchmark import Mode, refuse_missing_answers
from evaluation.benchmarks.vqa._open import with_short_instruction
from evaluation.judge_protocol import Judge
from evaluation.kit_view import answers_of_kit, views_of_kit
from evaluation.pandas_rules import seen
from evaluation.prompts import Prompt, PromptStyle, images_first
from evaluation.report import Cell, Report, Rows, RowScore, mean, mean_cell, mean_units
from evaluation.scorers import yesno
from evaluation.tsv import Row, Table
from mindspeed_mm.errors import DataError

YES_NO_WORDS = ("yes", "no")
JUDGE_OPTIONS = {"A": "yes", "B": "no"}


class Combined(NamedTuple):
    """What readings come to: fields of Report."""

    table: dict[str, dict[str, float]]
    units: dict[str, Sequence[float]]
    cells: dict[str, dict[str, Cell]]
    metric: str = "accuracy"
    statistic: str = "mean"
    scale: float = 1.0


@dataclass(frozen=True)
class YesNoReading:
    """What one answer was taken to say ("yes", "no", "unknown", in the spelling of the rule) and the truth."""

    row: Row
    view: Mapping[str, str]
    said: str
    truth: str

    @property
    def hit(self) -> int:
        """1 if both are equal."""
        return int(self.said.lower() == self.truth.lower())


@dataclass(frozen=True)
class YesNo:
    """A benchmark (evaluation.benchmark.Benchmark) whose answers are yes or no; here with plain accuracy."""

    name: str
    aliases: tuple[str, ...] = ()
    kind = "yes-no questions"

    def truth(self, cells: Mapping[str, str]) -> str:
        """The right answer of a row in lower case."""
        return cells["answer"].strip().lower()

    def check(self, table: Table) -> None:
        """Raise DataError when a column is missing, or an answer is neither yes nor no, or not there but in others."""
        if "question" not in table.columns:
            raise DataError(
                f"{table.path} lacks column question, which {self.name} needs; found {', '.join(table.columns)}."
            )
        for row in table.rows:
            if "answer" in row.cells and self.truth(row.cells) not in ("", *YES_NO_WORDS):
                raise DataError(
                    f'{table.path}, row with index {row.index}: the answer is "{row.cells["answer"][:40]}"; '
                    "expected Yes or No."
                )
        refuse_missing_answers(table)

    def has_answers(self, table: Table) -> bool:
        """True when every row has an answer."""
        return "answer" in table.columns and all(self.truth(row.cells) in YES_NO_WORDS for row in table.rows)

    def prompts(self, table: Table, style: PromptStyle) -> dict[int | str, Prompt]:
        """Official: question and LLaVA's short-answer instruction; vlmevalkit: the question alone."""
        if style == "official":
            texts = {row.index: self.official_text(row.cells["question"]) for row in table.rows}
        else:
            texts = {index: view.get("question", seen(None)) for index, view in views_of_kit(table).items()}
        return {row.index: images_first(texts[row.index], row, style, table) for row in table.rows}

    def official_text(self, question: str) -> str:
        """The text behind the image."""
        return with_short_instruction(question)

    def strict_reader(self) -> Callable[[str], str]:
        """How strict scoring reads an answer."""
        return yesno.strict_answer

    def compat_reader(self, table: Table) -> Callable[[str], str]:
        """How the public scorer reads an answer."""
        return yesno.kit_answer

    def score(
        self,
        table: Table,
        predictions: Mapping[int | str, str],
        mode: Mode,
        missing: int = 0,
        judge: Judge | None = None,
    ) -> Report:
        """Score answers, given by index in table order. Raises DataError when the table has no answers."""
        if not self.has_answers(table):
            raise DataError(f"{table.path} has no (or empty) answers in column answer; they are needed for scoring.")
        readings = self._read(table, predictions, mode)
        notes = {}
        if judge is not None:
            notes["put_to_judge"] = sum(reading.said.lower() == yesno.UNKNOWN for reading in readings)
            readings = [_judged(reading, predictions[reading.row.index], judge) for reading in readings]
        combined = self.combine(readings, mode, table)
        return Report(
            benchmark=self.name,
            mode=mode,
            rows=Rows((r.row.index, RowScore(r.said, r.hit, f"answer read as {r.said}")) for r in readings),
            unparsed=sum(reading.said.lower() == yesno.UNKNOWN for reading in readings),
            dropped=len(table.dropped),
            missing=missing,
            notes=notes,
            **combined._asdict(),
        )

    def _read(self, table: Table, predictions: Mapping[int | str, str], mode: Mode) -> list[YesNoReading]:
        rows = [row for row in table.rows if row.index in predictions]
        answers = [predictions[row.index] for row in rows]
        if mode == "compat" and not table.is_json_lines:
            views: Sequence[Mapping[str, str]] = list(views_of_kit(table, rows).values())
            answers = answers_of_kit(answers)
        else:
            views = [row.cells for row in rows]
        read = self.compat_reader(table) if mode == "compat" else self.strict_reader()
        return [
            YesNoReading(row, view, read(answer), self.truth(row.cells))
            for row, view, answer in zip(rows, views, answers, strict=True)
        ]

    def combine(self, readings: Sequence[YesNoReading], mode: Mode, table: Table) -> Combined:
        """Table, units and metric; here accuracy over all rows and per category."""
        names = sorted({reading.view["category"] for reading in readings if reading.view.get("category")})
        hits = {"Overall": [reading.hit for reading in readings]}
        for name in names:
            hits[name] = [reading.hit for reading in readings if reading.view.get("category") == name]
        return Combined(
            {"all": {name: mean(own) for name, own in hits.items()}},
            mean_units({reading.row.index: reading.hit for reading in readings}),
            {"all": {name: mean_cell(own) for name, own in hits.items()}},
        )


def refuse_near_names(table: Table, names: Sequence[str], benchmark: str) -> None:
    """Raise DataError for a category that differs from one of `names` by case or spaces only: it would be counted as
    another one, and left out of the headline."""
    meant = {name.lower(): name for name in names}
    for row in table.rows:
        for found in row.cells.get("category", "").split(","):
            name = meant.get(found.strip().lower())
            if name is not None and found != name:
                raise DataError(
                    f'{table.path}, row with index {row.index}: category "{found}" is not {benchmark}\'s "{name}", but '
                    f'looks like it. Write "{name}" if that is meant, else a name that is less like it.'
                )


def _judged(reading: YesNoReading, answer: str, judge: Judge) -> YesNoReading:
    if reading.said.lower() != yesno.UNKNOWN:
        return reading
    letter = judge.pick(reading.row.cells["question"], JUDGE_OPTIONS, answer)
    said = JUDGE_OPTIONS.get(letter, reading.said)
    return YesNoReading(
        reading.row, reading.view, said.capitalize() if reading.said[0].isupper() else said, reading.truth
    )
