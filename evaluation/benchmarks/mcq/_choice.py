"""What multiple-choice benchmarks have in common: columns question, A, B, ... and, for scoring, answer (a letter)."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluation.benchmark import Mode, refuse_missing_answers
from evaluation.judge_protocol import Judge
from evaluation.kit_view import answers_of_kit, views_of_kit
from evaluation.pandas_rules import seen
from evaluation.prompts import (
    DIRECT_INSTRUCTION,
    DIRECT_INSTRUCTION_CN,
    LETTER_INSTRUCTION,
    LETTER_INSTRUCTION_CN,
    Prompt,
    PromptStyle,
    images_first,
)
from evaluation.report import Report, Rows, RowScore, mean, mean_cell, mean_units
from evaluation.scorers import choice_compat, choice_strict
from evaluation.scorers.circular import ABBREVIATIONS, ROTATION_OFFSET, question_of
from evaluation.scorers.text import is_cjk
from evaluation.tsv import Row, Table
from mindspeed_mm.errors import DataError

CATEGORY_COLUMNS = ("l2-category", "category")
NO_SPLIT = "none"
"""Name of the one split of a table without a split column, as VLMEvalKit writes it."""

_LETTERS = frozenset(string.ascii_uppercase)


def refuse_rotations(name: str, table: Table) -> None:
    """Raise DataError for a table of the user's own that asks questions in rotated forms."""
    bases = {row.index for row in table.rows}
    rotated = [
        row.index
        for row in table.rows
        if isinstance(row.index, int) and row.index >= ROTATION_OFFSET and question_of(row.index) in bases
    ]
    if rotated:
        raise DataError(
            f"{name} asks each question in rotated forms ({len(rotated)} rows), which count only together, and plain "
            "accuracy would be a different number. Score it as mmbench_dev_en or another MMBench set."
        )


@dataclass(frozen=True)
class ChoiceReading:
    """What one answer was taken to say. `view` is the row as the scoring mode sees it; `letter` None: unreadable."""

    row: Row
    view: Mapping[str, str]
    letter: str | None
    hit: int
    log: str
    is_open: bool = False
    """An open question, whose answer is compared and not read."""


@dataclass(frozen=True)
class MultipleChoice:
    """A benchmark (evaluation.benchmark.Benchmark) whose answers are letters and whose metric is accuracy."""

    name: str
    aliases: tuple[str, ...] = ()
    kind = "multiple choice"
    rotations: bool | None = False
    """Whether the public table asks each question in rotated forms; None: both are known."""

    def truth(self, cells: Mapping[str, str]) -> str:
        """The right letter of a row."""
        return cells["answer"].strip()

    def check(self, table: Table) -> None:
        """Raise DataError when a needed column is missing, or an answer is no letter, or not there but in others."""
        missing = [name for name in ("question", "A", "B") if name not in table.columns]
        if missing:
            raise DataError(
                f"{table.path} lacks column {', '.join(missing)}, which {self.name} needs; "
                f"found {', '.join(table.columns)}."
            )
        for row in table.rows:
            answer = row.cells.get("answer", "")
            if answer.strip() and answer.strip() not in _LETTERS and not self.is_open(row.cells):
                raise DataError(
                    f'{table.path}, row with index {row.index}: the answer is "{answer[:40]}"; expected the letter '
                    "of an option, A to Z. Replace texts in column answer by letters."
                )
        refuse_missing_answers(table)

    def is_open(self, cells: Mapping[str, str]) -> bool:
        """True for a row whose answer is a text, not a letter; plain multiple choice has none."""
        return False

    def has_answers(self, table: Table) -> bool:
        """True when the table has a column answer with a text in every row."""
        return "answer" in table.columns and all(row.cells["answer"].strip() for row in table.rows)

    def prompts(self, table: Table, style: PromptStyle) -> dict[int | str, Prompt]:
        """Prompts by index. Style "official" gives turns for the model's template, "vlmevalkit" the finished text."""
        if style == "official":
            texts = self.official_texts(table)
        else:
            views = views_of_kit(table)
            texts = {row.index: choice_text(views[row.index]) for row in table.rows}
        return {row.index: images_first(texts[row.index], row, style, table) for row in table.rows}

    def official_texts(self, table: Table) -> dict[int | str, str]:
        """The text behind the images, by index."""
        return {row.index: choice_text(row.cells) for row in table.rows}

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
        rows = [row for row in table.rows if row.index in predictions]
        answers = [predictions[row.index] for row in rows]
        readings = (self.read_compat if mode == "compat" else self.read_strict)(table, rows, answers)
        notes = _by_image(readings)
        if judge is not None:
            notes["put_to_judge"] = sum(map(is_unread, readings))
            readings = [self._judged(reading, predictions[reading.row.index], judge) for reading in readings]
            notes |= _by_image(readings)
        views, hits, units = self.combine(readings, mode)
        cells = hits_by_cell(views, hits, table.columns)
        unreadable = choice_compat.UNREADABLE if mode == "compat" else None
        return Report(
            benchmark=self.name,
            mode=mode,
            table={line: {name: mean(own) for name, own in columns.items()} for line, columns in cells.items()},
            cells={
                line: {name: mean_cell(own) for name, own in columns.items() if own} for line, columns in cells.items()
            },
            rows=Rows((r.row.index, RowScore(r.letter or unreadable, r.hit, r.log)) for r in readings),
            units=units,
            unparsed=sum(is_unread(reading) for reading in readings),
            dropped=len(table.dropped),
            missing=missing,
            notes=notes,
        )

    def combine(
        self, readings: Sequence[ChoiceReading], mode: Mode
    ) -> tuple[list[Mapping[str, str]], list[int], dict[str, tuple[float, float]]]:
        """Views and hits of what is counted, and the units of the bootstrap; here every row counts for itself."""
        hits = [reading.hit for reading in readings]
        return [reading.view for reading in readings], hits, mean_units({r.row.index: r.hit for r in readings})

    def read_strict(self, table: Table, rows: Sequence[Row], answers: Sequence[str]) -> list[ChoiceReading]:
        """What a careful reader takes from each answer."""
        readings = []
        for row, answer in zip(rows, answers, strict=True):
            letter = choice_strict.read_choice(answer, options_of(row.cells))
            hit = int(letter is not None and letter == self.truth(row.cells))
            log = f"answer read as {letter}" if letter else "no single option could be read"
            readings.append(ChoiceReading(row, row.cells, letter, hit, log))
        return readings

    def read_compat(self, table: Table, rows: Sequence[Row], answers: Sequence[str]) -> list[ChoiceReading]:
        """VLMEvalKit's rules on the cells and answers that come back from the spreadsheet it writes."""
        views, truths = views_of_kit(table, rows), views_of_kit(table)
        readings = []
        for row, view, answer in zip(rows, views.values(), answers_of_kit(answers), strict=True):
            options, truth = self.kit_question(options_of(view), self.kit_truth(truths[row.index]))
            letter = choice_compat.read_choice(answer, options)
            hit = int(letter is not None and letter == truth)
            readings.append(ChoiceReading(row, view, letter, hit, f"answer seen as {answer[:200]}"))
        return readings

    def kit_truth(self, view: Mapping[str, str]) -> str | None:
        """The answer cell as VLMEvalKit compares it."""
        return view.get("answer")

    def kit_question(self, options: dict[str, str], truth: str | None) -> tuple[dict[str, str], str | None]:
        """Options and right letter as VLMEvalKit puts them to its answer rule."""
        return options, truth

    def _judged(self, reading: ChoiceReading, answer: str, judge: Judge) -> ChoiceReading:
        options = options_of(reading.row.cells)
        if not is_unread(reading) or not options:
            return reading
        letter = judge.pick(reading.row.cells.get("question", ""), options, answer)
        hit = int(letter is not None and letter == self.truth(reading.row.cells))
        return ChoiceReading(reading.row, reading.view, letter, hit, f"judge read {letter or 'no option'}")


def _by_image(readings: Sequence[ChoiceReading]) -> dict[str, float]:
    """Accuracy with and without an image, where the table has both (LLaVA's "IMG-Accuracy" of ScienceQA)."""
    groups = {
        "accuracy_with_image": [reading.hit for reading in readings if reading.row.image_count],
        "accuracy_text_only": [reading.hit for reading in readings if not reading.row.image_count],
    }
    return {name: mean(hits) for name, hits in groups.items()} if all(groups.values()) else {}


def is_unread(reading: ChoiceReading) -> bool:
    """True when an option was looked for and none could be read."""
    return reading.letter in (None, choice_compat.UNREADABLE) and not reading.is_open


def choice_text(cells: Mapping[str, str]) -> str:
    """Hint, question, options and instruction, as VLMEvalKit's LLaVA prompt puts them."""
    question = cells.get("question", seen(None))
    if cells.get("hint"):
        question = f"{cells['hint']}\n{question}"
    options = options_of(cells)
    lines = [question, *(f"{letter}. {text}" for letter, text in options.items())]
    chinese = any(map(is_cjk, "\n".join(lines)))
    if options:
        lines.append(LETTER_INSTRUCTION_CN if chinese else LETTER_INSTRUCTION)
    else:
        lines.append(DIRECT_INSTRUCTION_CN if chinese else DIRECT_INSTRUCTION)
    return "\n".join(lines)


def options_of(cells: Mapping[str, str]) -> dict[str, str]:
    """Texts of the options that are there, by letter."""
    return {letter: cells[letter] for letter in string.ascii_uppercase if cells.get(letter)}


def hits_by_cell(
    views: Sequence[Mapping[str, str]], hits: Sequence[int], columns: Sequence[str]
) -> dict[str, dict[str, list[int]]]:
    """{split: {"Overall": hits, each l2-category: .., each category: ..}}; empty cells belong to no category."""
    splits = [view.get("split") or NO_SPLIT for view in views] if "split" in columns else [NO_SPLIT] * len(views)
    groups = [
        (ABBREVIATIONS.get(value, value), column, value)
        for column in CATEGORY_COLUMNS
        if column in columns
        for value in sorted({view[column] for view in views if view.get(column)})
    ]
    table = {}
    for split in sorted(set(splits)):
        inside = [(view, hit) for view, hit, name in zip(views, hits, splits, strict=True) if name == split]
        table[split] = {"Overall": [hit for _, hit in inside]}
        for name, column, value in groups:
            table[split][name] = [hit for view, hit in inside if view.get(column) == value]
    return table
