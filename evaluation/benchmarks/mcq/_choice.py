"""What multiple-choice benchmarks have in common: columns question, A, B, ... and, for scoring, answer (a letter)."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluation.benchmarks import Mode, Prompt, PromptStyle
from evaluation.pandas_rules import Value, read_column, seen, through_spreadsheet
from evaluation.report import Report, Rows, RowScore, mean, wilson_interval
from evaluation.scorers import choice_compat, choice_strict
from evaluation.scorers.text import is_cjk
from evaluation.tsv import Row, Table
from mindspeed_mm.constants import IMAGE_TOKEN
from mindspeed_mm.errors import DataError

LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."
LETTER_INSTRUCTION_CN = "\u8bf7\u76f4\u63a5\u56de\u7b54\u9009\u9879\u5b57\u6bcd\u3002"
DIRECT_INSTRUCTION = "Answer the question directly."
DIRECT_INSTRUCTION_CN = "\u8bf7\u76f4\u63a5\u56de\u7b54\u95ee\u9898\u3002"
"""Suffixes of LLaVA's and VLMEvalKit's multiple-choice prompts; the Chinese ones where the text has Chinese in it."""

KIT_PROMPT = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. USER: {images}{text} ASSISTANT: "
)
"""VLMEvalKit's LLaVA prompt; it says "human" and ends with a space, unlike LLaVA's own."""

CATEGORY_ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
"""Column names of VLMEvalKit's tables for MMBench's category names."""

CATEGORY_COLUMNS = ("l2-category", "category")
NO_SPLIT = "none"
"""Name of the one split of a table without a split column, as VLMEvalKit writes it."""

_LETTERS = frozenset(string.ascii_uppercase)
ROTATION_OFFSET = 1_000_000
"""Circular benchmarks number the rotations of question i as i + k * 1,000,000 (MMBench's tables)."""


def refuse_special_rules(name: str, table: Table) -> None:
    """Raise DataError for tables that look like plain multiple choice and are scored by other rules."""
    if name.lower().startswith("mmmu"):
        raise DataError(f"{name} has open questions and is no plain multiple choice; it is not supported yet.")
    rotated = [row.index for row in table.rows if isinstance(row.index, int) and row.index >= ROTATION_OFFSET]
    bases = {row.index for row in table.rows}
    rotated = [index for index in rotated if index % ROTATION_OFFSET in bases]
    if name.lower().startswith("mmbench") or rotated:
        raise DataError(
            f"{name} asks each question in rotated forms ({len(rotated)} rows), which count only together; this "
            "circular evaluation is not supported yet, and plain accuracy would be a different number."
        )


@dataclass(frozen=True)
class MultipleChoice:
    """A benchmark (evaluation.benchmarks.Benchmark) whose answers are letters and whose metric is accuracy."""

    name: str

    def check(self, table: Table) -> None:
        """Raise DataError when a needed column is missing, or an answer is no letter."""
        missing = [name for name in ("question", "A", "B") if name not in table.columns]
        if missing:
            raise DataError(
                f"{table.path} lacks column {', '.join(missing)}, which {self.name} needs; "
                f"found {', '.join(table.columns)}."
            )

        for row in table.rows:
            answer = row.cells.get("answer", "")
            if answer and answer.strip() not in _LETTERS:
                raise DataError(
                    f'{table.path}, row with index {row.index}: the answer is "{answer[:40]}"; expected the letter '
                    "of an option, A to Z. Replace texts in column answer by letters."
                )

    def has_answers(self, table: Table) -> bool:
        """True when the table has a column answer with a text in every row."""
        return "answer" in table.columns and all(row.cells["answer"] for row in table.rows)

    def prompts(self, table: Table, style: PromptStyle) -> dict[int | str, Prompt]:
        """Prompts by index. Style "official" gives turns for the model's template, "vlmevalkit" the finished text."""
        if style == "official":
            views = {row.index: dict(row.cells) for row in table.rows}
        else:
            views = _views_of_kit(table)
        return {row.index: self._prompt(row, views[row.index], style, table) for row in table.rows}

    def _prompt(self, row: Row, cells: Mapping[str, str], style: PromptStyle, table: Table) -> Prompt:
        question = cells.get("question", seen(None))
        if cells.get("hint"):
            question = f"{cells['hint']}\n{question}"
        options = _options(cells)
        lines = [question, *(f"{letter}. {text}" for letter, text in options.items())]
        chinese = any(map(is_cjk, "\n".join(lines)))
        if options:
            lines.append(LETTER_INSTRUCTION_CN if chinese else LETTER_INSTRUCTION)
        else:
            lines.append(DIRECT_INSTRUCTION_CN if chinese else DIRECT_INSTRUCTION)
        text = "\n".join(lines)
        if IMAGE_TOKEN in text:
            raise DataError(
                f"{table.path}, row with index {row.index}: the text holds {IMAGE_TOKEN}, which stands for a picture; "
                "pictures are placed before the question. Remove it there."
            )
        if style == "official":
            return Prompt(turns=((f"{IMAGE_TOKEN}\n" * row.image_count + text, None),))
        return Prompt(text=KIT_PROMPT.format(images=f" {IMAGE_TOKEN} " * row.image_count, text=text))

    def score(self, table: Table, predictions: Mapping[int | str, str], mode: Mode, missing: int = 0) -> Report:
        """Score answers, given by index in table order.

        Raises DataError when the table has no answers.
        """
        if not self.has_answers(table):
            raise DataError(f"{table.path} has no (or empty) answers in column answer; they are needed for scoring.")
        rows = [row for row in table.rows if row.index in predictions]
        answers = [predictions[row.index] for row in rows]
        score = _score_compat if mode == "compat" else _score_strict
        views, scores = score(table, rows, answers)
        by_index = Rows(zip((row.index for row in rows), scores, strict=True))
        hits = [row_score.hit for row_score in scores]
        return Report(
            benchmark=self.name,
            mode=mode,
            table=accuracy_table(views, hits, table.columns),
            rows=by_index,
            overall=mean(hits),
            interval=wilson_interval(sum(hits), len(hits)),
            unparsed=sum(row_score.extracted in (None, choice_compat.UNREADABLE) for row_score in scores),
            dropped=len(table.dropped),
            missing=missing,
        )


def accuracy_table(
    views: Sequence[Mapping[str, str]], hits: Sequence[int], columns: Sequence[str]
) -> dict[str, dict[str, float]]:
    """{split: {"Overall": .., each l2-category: .., each category: ..}}; empty cells belong to no category."""
    splits = [view.get("split") or NO_SPLIT for view in views] if "split" in columns else [NO_SPLIT] * len(views)
    groups = [
        (CATEGORY_ABBREVIATIONS.get(value, value), column, value)
        for column in CATEGORY_COLUMNS
        if column in columns
        for value in sorted({view[column] for view in views if view.get(column)})
    ]
    table = {}
    for split in sorted(set(splits)):
        inside = [(view, hit) for view, hit, name in zip(views, hits, splits, strict=True) if name == split]
        table[split] = {"Overall": mean(hit for _, hit in inside)}
        for name, column, value in groups:
            table[split][name] = mean(hit for view, hit in inside if view.get(column) == value)
    return table


def _score_strict(
    table: Table, rows: Sequence[Row], answers: Sequence[str]
) -> tuple[list[Mapping[str, str]], list[RowScore]]:
    scores = []
    for row, answer in zip(rows, answers, strict=True):
        letter = choice_strict.read_choice(answer, _options(row.cells))
        hit = int(letter is not None and letter == row.cells["answer"].strip())
        scores.append(RowScore(letter, hit, f"answer read as {letter}" if letter else "no single option could be read"))
    return [row.cells for row in rows], scores


def _score_compat(
    table: Table, rows: Sequence[Row], answers: Sequence[str]
) -> tuple[list[Mapping[str, str]], list[RowScore]]:
    """VLMEvalKit's rules on the cells and answers that come back from the spreadsheet it writes."""
    views = _views_of_kit(table, rows)
    truths = _views_of_kit(table)
    scores = []
    for row, view, value in zip(rows, views.values(), through_spreadsheet(answers), strict=True):
        letter = choice_compat.read_choice(seen(value), _options(view))
        hit = int(letter is not None and letter == truths[row.index].get("answer"))
        log = f"answer seen as {seen(value)[:200]}"
        scores.append(RowScore(letter or choice_compat.UNREADABLE, hit, log))
    return list(views.values()), scores


def _options(cells: Mapping[str, str]) -> dict[str, str]:
    return {letter: cells[letter] for letter in string.ascii_uppercase if cells.get(letter)}


def _views_of_kit(table: Table, written: Sequence[Row] | None = None) -> dict[int | str, dict[str, str]]:
    """Cells by index as VLMEvalKit sees them, missing ones left out; after its spreadsheet for the rows `written`."""
    rows = table.rows if written is None else written
    views: dict[int | str, dict[str, str]] = {row.index: {} for row in rows}
    for column in table.all_cells[0]:
        values: Sequence[Value] = read_column([cells[column] for cells in table.all_cells])
        values = [values[row.position] for row in rows]
        if written is not None:
            values = through_spreadsheet(values)
        for row, value in zip(rows, values, strict=True):
            if value is not None:
                views[row.index][column] = seen(value)
    return views
