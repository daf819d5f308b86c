"""What benchmarks with open questions have in common: columns question and, for scoring, answer.

An answer cell holds one text, or a Python list of accepted texts.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from evaluation.benchmarks import Mode
from evaluation.judge_protocol import Judge
from evaluation.kit_view import answers_of_kit, views_of_kit
from evaluation.pandas_rules import seen
from evaluation.prompts import SHORT_INSTRUCTION, Prompt, PromptStyle, images_first
from evaluation.report import Report, Rows, RowScore, mean, mean_cell, mean_units
from evaluation.scorers import exact
from evaluation.scorers.cells import kit_answers
from evaluation.scorers.text import strip_special_tokens
from evaluation.tsv import Table
from mindspeed_mm.errors import DataError

Scorer = Callable[[str, str], float]
"""(answer cell, prediction) -> 0..1."""

LINE = "all"
"""Name of the one line of a table of open questions."""


@dataclass(frozen=True)
class OpenQuestions:
    """A benchmark (evaluation.benchmarks.Benchmark) whose score is the mean of a text comparison."""

    name: str
    kit_score: Scorer
    strict_score: Scorer
    metric: str = "accuracy"
    aliases: tuple[str, ...] = ()
    kind = "open questions"
    submission: str | None = None
    """Form of the file that a test server takes (evaluation.submissions)."""

    def check(self, table: Table) -> None:
        """Raise DataError when the questions are missing, or an answer is an empty list."""
        if "question" not in table.columns:
            raise DataError(
                f"{table.path} lacks column question, which {self.name} needs; found {', '.join(table.columns)}."
            )
        for row in table.rows:
            if not kit_answers(row.cells.get("answer", "")):
                raise DataError(
                    f"{table.path}, row with index {row.index}: the answer is an empty list; give at least one."
                )

    def has_answers(self, table: Table) -> bool:
        """True when the table has a column answer and a text in it; single answers may be empty texts."""
        return "answer" in table.columns and any(row.cells["answer"] for row in table.rows)

    def prompts(self, table: Table, style: PromptStyle) -> dict[int | str, Prompt]:
        """Question and LLaVA's short-answer instruction."""
        if style == "official":
            texts = self.official_texts(table)
        else:
            views = views_of_kit(table)
            texts = {
                row.index: f"{views[row.index].get('question', seen(None))}\n{SHORT_INSTRUCTION}" for row in table.rows
            }
        return {row.index: images_first(texts[row.index], row, style, table) for row in table.rows}

    def official_texts(self, table: Table) -> dict[int | str, str]:
        """The text behind the image, by index. Question files of LLaVA already end with the instruction."""
        return {row.index: with_short_instruction(row.cells["question"]) for row in table.rows}

    def score(
        self,
        table: Table,
        predictions: Mapping[int | str, str],
        mode: Mode,
        missing: int = 0,
        judge: Judge | None = None,
    ) -> Report:
        """Score answers, given by index in table order; a judge has nothing to read here.

        Raises DataError when the table has no answers.
        """
        if not self.has_answers(table):
            raise DataError(f"{table.path} has no answers in column answer; they are needed for scoring.")
        rows = [row for row in table.rows if row.index in predictions]
        answers = [predictions[row.index] for row in rows]
        if mode == "compat":
            views: Sequence[Mapping[str, str]] = list(views_of_kit(table, rows).values())
            given, compare = answers_of_kit(answers), self.kit_score
        else:
            views, given, compare = [row.cells for row in rows], answers, self.strict_score
        golds = [view.get("answer", seen(None)) if mode == "compat" else view["answer"] for view in views]
        scores = [compare(gold, answer) for gold, answer in zip(golds, given, strict=True)]
        indices = [row.index for row in rows]
        columns = _columns(views, scores, table.columns)
        return Report(
            benchmark=self.name,
            mode=mode,
            table={LINE: {name: 100 * mean(own) for name, own in columns.items()}},
            cells={LINE: {name: mean_cell(own, 100) for name, own in columns.items()}},
            rows=Rows(
                (index, RowScore(strip_special_tokens(answer).strip(), score, f"compared with {gold[:200]}"))
                for index, answer, gold, score in zip(indices, given, golds, scores, strict=True)
            ),
            units=mean_units(dict(zip(indices, scores, strict=True))),
            unparsed=sum(not strip_special_tokens(answer).strip() for answer in answers),
            metric=self.metric,
            scale=100,
            dropped=len(table.dropped),
            missing=missing,
        )


def with_short_instruction(question: str) -> str:
    """The question with LLaVA's short-answer instruction behind it, once."""
    return question if question.endswith(f"\n{SHORT_INSTRUCTION}") else f"{question}\n{SHORT_INSTRUCTION}"


def _columns(
    views: Sequence[Mapping[str, str]], scores: Sequence[float], columns: Sequence[str]
) -> dict[str, list[float]]:
    """Scores by VLMEvalKit's columns: the splits and Overall, or Overall and the categories."""

    def by(column: str) -> dict[str, list[float]]:
        names = sorted({view[column] for view in views if view.get(column)})
        return {name: [s for v, s in zip(views, scores, strict=True) if v.get(column) == name] for name in names}

    overall = {"Overall": list(scores)}
    if "split" in columns:
        return by("split") | overall
    return overall | by("category") if "category" in columns else overall


OWN_QUESTIONS = functools.partial(
    OpenQuestions, kit_score=exact.kit_best, strict_score=exact.strict_score, metric="exact match"
)
"""For a table of the user's own, given its name."""
