"""Captions: one sentence on an image, compared with those of several people by CIDEr and BLEU.

A table has the columns image and answer (a caption, or a Python list of them), and may have its own question.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluation.benchmark import Mode
from evaluation.judge_protocol import Judge
from evaluation.kit_view import answers_of_kit, views_of_kit
from evaluation.pandas_rules import seen
from evaluation.prompts import Prompt, PromptStyle, images_first
from evaluation.report import Report, Rows, RowScore, mean_cell, mean_units
from evaluation.scorers.captions import ORDERS, Caption, CaptionScores, caption_scores, caption_words
from evaluation.scorers.cells import kit_answers, strict_answers
from evaluation.scorers.text import strip_special_tokens
from evaluation.tsv import Table
from mindspeed_mm.errors import DataError

QUESTION = "Provide a one-sentence caption for the provided image."
KIT_QUESTION = (
    "Please describe this image in general. Directly provide the description, do not include prefix like "
    '"This image depicts". '
)
LINE = "all"
"""Name of the one line of a table without splits."""


@dataclass(frozen=True)
class Captions:
    """A benchmark (evaluation.benchmark.Benchmark) of captions. strict: words as `caption_words` finds them; compat:
    VLMEvalKit's, which splits at white space and keeps case and marks."""

    name: str
    aliases: tuple[str, ...] = ()
    kind = "captions"

    def check(self, table: Table) -> None:
        """Raise DataError when an answer is an empty list, or some rows have one and others not."""
        answered = [bool(row.cells.get("answer", "").strip()) for row in table.rows]
        if any(answered) and not all(answered):
            raise DataError(
                f"{table.path}, row with index {table.rows[answered.index(False)].index}: the answer is empty, but "
                "other rows have one; expected a caption, or a list of them. Write it, or remove the row."
            )
        for row in table.rows:
            if not kit_answers(row.cells.get("answer", "")):
                raise DataError(
                    f"{table.path}, row with index {row.index}: the answer is an empty list; give at least one caption."
                )

    def has_answers(self, table: Table) -> bool:
        """True when the table has captions."""
        return bool(table.rows[0].cells.get("answer", "").strip())

    def prompts(self, table: Table, style: PromptStyle) -> dict[int | str, Prompt]:
        """The table's question, or the style's own."""
        if style == "official":
            texts = {row.index: row.cells.get("question") or QUESTION for row in table.rows}
        elif "question" in table.columns:
            texts = {index: view.get("question", seen(None)) for index, view in views_of_kit(table).items()}
        else:
            texts = dict.fromkeys((row.index for row in table.rows), KIT_QUESTION)
        return {row.index: images_first(texts[row.index], row, style, table) for row in table.rows}

    def score(
        self,
        table: Table,
        predictions: Mapping[int | str, str],
        mode: Mode,
        missing: int = 0,
        judge: Judge | None = None,
    ) -> Report:
        """CIDEr of the set, 0..10, times 100 in the table; how rare words are is counted over the scored rows.

        Raises DataError when the table has no captions.
        """
        if not self.has_answers(table):
            raise DataError(f"{table.path} has no captions in column answer; they are needed for scoring.")
        rows = [row for row in table.rows if row.index in predictions]
        answers = [predictions[row.index] for row in rows]
        if mode == "compat":
            views = views_of_kit(table, rows)
            golds = [kit_answers(views[row.index].get("answer", seen(None))) for row in rows]
            captions = [
                Caption(answer.split(), [str(gold).split() for gold in own])
                for answer, own in zip(answers_of_kit(answers), golds, strict=True)
            ]
        else:
            golds = [strict_answers(row.cells["answer"]) for row in rows]
            captions = [
                Caption(caption_words(answer), [caption_words(gold) for gold in own])
                for answer, own in zip(answers, golds, strict=True)
            ]
        found = caption_scores(captions)
        indices = [row.index for row in rows]
        lines = {LINE: (found, found.ciders)} | _splits(table, captions, [row.cells.get("split", "") for row in rows])
        return Report(
            benchmark=self.name,
            mode=mode,
            table={line: _columns(scores) for line, (scores, _) in lines.items()},
            cells={line: {"CIDEr": mean_cell(ciders, 100)} for line, (_, ciders) in lines.items()},
            rows=Rows(
                (index, RowScore(strip_special_tokens(answer).strip(), score, f"compared with {str(gold[0])[:200]}"))
                for index, answer, gold, score in zip(indices, answers, golds, found.ciders, strict=True)
            ),
            units=mean_units(dict(zip(indices, found.ciders, strict=True))),
            unparsed=sum(not caption.words for caption in captions),
            metric="CIDEr",
            scale=100,
            dropped=len(table.dropped),
            missing=missing,
        )


def _splits(
    table: Table, captions: Sequence[Caption], splits: Sequence[str]
) -> dict[str, tuple[CaptionScores, tuple[float, ...]]]:
    """Scores of each split as a set of its own."""
    if "split" not in table.columns:
        return {}
    groups = {name: [c for c, own in zip(captions, splits, strict=True) if own == name] for name in sorted({*splits})}
    scores = {name: caption_scores(group) for name, group in groups.items() if name}
    return {name: (one, one.ciders) for name, one in scores.items()}


def _columns(scores: CaptionScores) -> dict[str, float]:
    bleus = {f"BLEU-{order}": 100 * scores.bleu[order - 1] for order in range(1, ORDERS + 1)}
    return {"CIDEr": 100 * scores.cider} | bleus


BENCHMARKS = (
    Captions("COCO_VAL", aliases=("coco_caption",)),
    Captions("Flickr30k_TEST", aliases=("flickr30k",)),
    Captions("NoCaps_VAL", aliases=("nocaps",)),
    Captions("Captions"),
)
"""The last one is for any table of captions."""
