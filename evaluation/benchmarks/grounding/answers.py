"""Shikra's question sets with exact answers: GQA, POPE and Point-QA (Chen et al., 2023).

The answer is what stands behind "the answer is"; upper and lower case count. Questions are the sets' own JSON lines:
GQA's imageId, question and answer; POPE's image, text and label; Point-QA's file_path, question (or general_question),
point or bbox, and answer. A point or box is written behind the question, as fractions of the image padded to a square.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from evaluation.benchmark import Mode
from evaluation.judge_protocol import Judge
from evaluation.prompts import Prompt, PromptStyle, refuse_kit_style
from evaluation.report import Report, Rows, RowScore, mean_cell, mean_units
from evaluation.scorers.final_answer import Form, final_answer
from evaluation.tsv import Row, Table
from mindspeed_mm.constants import IMAGE_TOKEN
from mindspeed_mm.data.grounding.geometry import ExpandToSquare, final_size, fractions, moved
from mindspeed_mm.data.grounding.notation import BracketNotation
from mindspeed_mm.errors import DataError

PAD = (ExpandToSquare(),)
QUESTIONS = ("question", "general_question")
"""Columns with the question, the first that is there."""


@dataclass(frozen=True)
class ExactAnswers:
    """A benchmark (evaluation.benchmark.Benchmark) that reads the words behind "the answer is"."""

    name: str
    form: Form = "sentence"
    place: str | None = None
    """Column of the box or point that stands behind the question."""

    aliases: tuple[str, ...] = ()
    by_order = True
    """Answers without an index are taken in the order of the questions, as Shikra's files are."""

    def check(self, table: Table) -> None:
        """Raise DataError when a column is missing, or a box or point is none."""
        wanted = ["answer", "image_path"] + ([self.place] if self.place else [])
        missing = [name for name in wanted if name not in table.columns]
        if not set(QUESTIONS) & set(table.columns):
            missing.insert(0, "question")
        if missing:
            raise DataError(
                f"{table.path} lacks {', '.join(missing)}, which {self.name} needs; found {', '.join(table.columns)}. "
                "Expected the set's own JSON lines."
            )
        for row in table.rows:
            if row.image_count != 1:
                raise DataError(
                    f"{table.path}, row with index {row.index}: found {row.image_count} images; expected just one."
                )
            if self.place:
                self._pixels(row, table)

    def has_answers(self, table: Table) -> bool:
        """Always true: the answers are part of the questions."""
        return True

    def prompts(self, table: Table, style: PromptStyle) -> dict[int | str, Prompt]:
        """The image and the question, with its box or point. VLMEvalKit has no such benchmark."""
        refuse_kit_style(self.name, style)
        return {
            row.index: Prompt(turns=((f"{IMAGE_TOKEN}\n{self._question(row, table)}", None),)) for row in table.rows
        }

    def score(
        self,
        table: Table,
        predictions: Mapping[int | str, str],
        mode: Mode,
        missing: int = 0,
        judge: Judge | None = None,
    ) -> Report:
        """Accuracy over all rows. compat reads the right answer out of Shikra's sentence, which may cut it at a dot."""
        rows = [row for row in table.rows if row.index in predictions]
        scores, detail, target_failed = Rows(), [], 0
        for row in rows:
            answer = row.cells["answer"]
            target = f"The answer is {answer}."
            wanted = final_answer(target, self.form) if mode == "compat" else answer.strip().removesuffix(".").strip()
            target_failed += wanted is None
            said = final_answer(predictions[row.index], self.form)
            scores[row.index] = RowScore(said, int(wanted is not None and said == wanted))
            detail.append({"pred": predictions[row.index], "target": target})
        failed = sum(score.extracted is None for score in scores.values())
        hits = [score.hit for score in scores.values()]
        return Report(
            benchmark=self.name,
            mode=mode,
            table={"all": {"accuracy": sum(hits) / len(hits), "target_failed": target_failed, "failed": failed}},
            cells={"all": {"accuracy": mean_cell(hits)}},
            rows=scores,
            units=mean_units({index: score.hit for index, score in scores.items()}),
            unparsed=failed,
            metric="exact answers",
            dropped=len(table.dropped),
            missing=missing,
            attachments={"extra_prediction.jsonl": detail},
        )

    def _question(self, row: Row, table: Table) -> str:
        question = next(row.cells[name] for name in QUESTIONS if name in row.cells)
        if self.place is None:
            return question
        (image,) = table.images(row)
        entry = moved(self._pixels(row, table), image.size, PAD)
        return f"{question} {BracketNotation().format([fractions(entry, *final_size(image.size, PAD))])}"

    def _pixels(self, row: Row, table: Table) -> list[float]:
        try:
            found = json.loads(row.cells[self.place])
        except ValueError:
            found = None
        count = 4 if self.place == "bbox" else 2
        if not isinstance(found, list) or len(found) != count or not all(isinstance(n, int | float) for n in found):
            raise DataError(
                f"{table.path}, row with index {row.index}: {self.place} is {row.cells[self.place][:40]}; expected "
                f"{count} numbers in pixels."
            )
        return found


BENCHMARKS = (
    ExactAnswers("GQA_Shikra"),
    ExactAnswers("POPE_Shikra"),
    ExactAnswers("PointQA", "point_qa", "point", aliases=("PointQA_Point",)),
    ExactAnswers("PointQA_Box", "point_qa", "bbox"),
)
