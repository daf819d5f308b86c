"""SHR, the share of hallucinated sentences in a detailed description (Zhao et al., 2023, HA-DPO).

A judge compares each sentence with what people wrote of the image: regions of Visual Genome and SHR's facts. Without a
judge only lengths and repetitions are measured. The request to the judge is in our own words, or in a file's.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from string import Formatter
from typing import Any

from evaluation.benchmark import Mode
from evaluation.judge_protocol import SentenceJudge
from evaluation.prompts import Prompt, PromptStyle, images_first, refuse_kit_style
from evaluation.report import Cell, Report, Rows, RowScore, mean, mean_cell, mean_units
from evaluation.scorers.sentences import (
    LABELS,
    MARK,
    NGRAMS,
    JudgedText,
    compat_labels,
    distinct_share,
    rates,
    split_sentences,
    strict_labels,
)
from evaluation.scorers.text import strip_special_tokens
from evaluation.tsv import Row, Table
from mindspeed_mm.data.progress import progress_bar
from mindspeed_mm.errors import DataError

RUN = "run1"
"""Name of the one run in HA-DPO's files."""
LONGEST_PROMPT = 15_000
"""Characters above which HA-DPO's script for LLaVA leaves an image out."""
GRAM = "gram-{}-repetition"
LONGEST_RUN = NGRAMS[-1]
LENGTHS = ("sents_per_image", "words_per_image")
RATIO = "mean of ratios"
DIGITS = 3
PLACES = ("regions", "facts", "sentences")
INSTRUCTION = """You check a description of an image, sentence by sentence. You do not see the image.
Two lists say what is on it.

Regions, each as [left, top, right, bottom] in fractions of the image's size and a phrase. Regions that overlap much may
show the same thing:
{regions}

Facts, all of them true:
{facts}

Sentences to check:
{sentences}

Give each sentence one of these labels:
hallucination - the lists contradict the sentence, or it names something that would be in them and is not;
correct - the lists say the same or imply it;
cannot judge - it is about what the lists do not cover, such as mood or style.

Reply with the line "Judgement:" and then one line for each sentence, in order: its number, a point, the label, a colon
and the reason. For example:
Judgement:
1. correct: the second region shows it.
"""


@dataclass(frozen=True)
class SHR:
    """A benchmark (evaluation.benchmark.Benchmark) of descriptions."""

    name: str = "SHR"
    aliases: tuple[str, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=lambda: {"num_beams": 5, "max_new_tokens": 512})
    """HA-DPO's decoding for LLaVA, which a run has by default."""
    judges_sentences = True
    """Takes a SentenceJudge, also a recorded one."""
    instruction: str = INSTRUCTION
    """What the judge is asked, with {regions}, {facts} and {sentences} in it."""

    def asking(self, path: str | Path) -> "SHR":
        """The same with the request that a text file holds: its three {} stand for regions, facts and sentences in that
        order, or have these names.

        Raises DataError for a file that cannot be read, or has other places.
        """
        try:
            pieces = [piece[:2] for piece in Formatter().parse(Path(path).read_text(encoding="utf-8"))]
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read the judge's request {path}: {error}; expected a text file.") from error
        places = [name for _, name in pieces if name is not None]
        if sorted(places) != sorted(PLACES) and places != [""] * len(PLACES):
            raise DataError(
                f"{path} has the places {places}; expected {{regions}}, {{facts}} and {{sentences}} once each, or "
                "three {}. Write other braces twice."
            )
        names = iter(places if any(places) else PLACES)
        filled = ("" if name is None else f"{{{next(names)}}}" for _, name in pieces)
        texts = (text.replace("{", "{{").replace("}", "}}") for text, _ in pieces)
        return replace(self, instruction="".join(map("".join, zip(texts, filled, strict=True))))

    def check(self, table: Table) -> None:
        """Raise DataError for a table that is not made of SHR's folder."""
        if not {"regions", "facts"} <= set(table.columns):
            raise DataError(
                f"{table.path} is not SHR's folder; expected one with val_images_final.json, shr_factual_part1.jsonl "
                "and shr_factual_part2.jsonl, and Visual Genome's as --image-root."
            )

    def has_answers(self, table: Table) -> bool:
        """Always true: repetition needs no answer, and the judge has the regions."""
        return True

    def prompts(self, table: Table, style: PromptStyle) -> dict[int | str, Prompt]:
        """HA-DPO's one request. VLMEvalKit has no such benchmark."""
        refuse_kit_style(self.name, style)
        return {row.index: images_first(row.cells["question"], row, style, table) for row in table.rows}

    def score(
        self,
        table: Table,
        predictions: Mapping[int | str, str],
        mode: Mode,
        missing: int = 0,
        judge: SentenceJudge | None = None,
    ) -> Report:
        """Hallucinated sentences / those with a label. strict: all images, verdicts found by their numbers; compat:
        HA-DPO's reading of the same replies, without images whose prompt is long, rounded to three digits.

        Raises DataError when the judge cannot be reached, or none of its replies can be read.
        """
        answers = {
            row.index: strip_special_tokens(predictions[row.index]).strip()
            for row in table.rows
            if row.index in predictions
        }
        texts = {index: JudgedText(split_sentences(text), None) for index, text in answers.items()}
        common = {"benchmark": self.name, "mode": mode, "dropped": len(table.dropped), "missing": missing}
        if judge is None:
            return Report(**common, **_unjudged(answers, texts, mode))
        replies = _replies(table, texts, self.instruction, judge, mode)
        found = _judged(answers, texts, replies, mode)
        if self.instruction != INSTRUCTION:
            found["notes"] |= {"judge_prompt_sha256": hashlib.sha256(self.instruction.encode()).hexdigest()}
        return Report(**common, **found)


def _repetition(answers: Mapping[int | str, str]) -> tuple[dict[str, float], dict[str, Cell]]:
    """Mean shares of distinct runs of words, over the answers that are long enough, and what they are made of."""
    grams = {GRAM.format(n): [distinct_share(text, n) for text in answers.values()] for n in NGRAMS}
    grams = {name: [share for share in shares if share is not None] for name, shares in grams.items()}
    cells = {name: mean_cell(shares) for name, shares in grams.items() if shares}
    return {name: mean(shares) for name, shares in grams.items()}, cells


def _unjudged(answers: Mapping[int | str, str], texts: Mapping[int | str, JudgedText], mode: Mode) -> dict[str, Any]:
    """Fields of the report without a judge."""
    lengths = {name: value for name, value in rates(list(texts.values())).items() if name in LENGTHS}
    shares = {index: distinct_share(text, LONGEST_RUN) for index, text in answers.items()}
    repetition, cells = _repetition(answers)
    return {
        "table": {"all": _rounded(lengths | repetition, mode)},
        "cells": {"all": cells},
        "rows": Rows({index: RowScore(None, share or 0.0, "no judge") for index, share in shares.items()}),
        "units": mean_units({index: share for index, share in shares.items() if share is not None}),
        "unparsed": 0,
        "metric": f"{GRAM.format(LONGEST_RUN)}, no judge",
    }


def _judged(
    answers: Mapping[int | str, str],
    texts: Mapping[int | str, JudgedText],
    replies: Mapping[int | str, str | None],
    mode: Mode,
) -> dict[str, Any]:
    """Fields of the report with a judge's replies."""
    reader = strict_labels if mode == "strict" else compat_labels
    judged = {}
    for index, reply in replies.items():
        sentences = texts[index].sentences
        judged[index] = JudgedText(sentences, reader(reply or "", len(sentences)) if sentences else [])
    counts = {index: text.counts() for index, text in judged.items()}
    found = {"mean_hal_ratio": math.nan} | rates(list(judged.values()))
    found["mean_hal_ratio"] = found["hal_sents_ratio"]
    repetition, cells = _repetition(answers)
    units = {str(index): (one["hal_sentences"], one["labelled_sentences"]) for index, one in counts.items()}
    if math.isnan(found["mean_hal_ratio"]):
        units = {}
    else:
        by_words = [(one["hal_words"], one["labelled_words"]) for one in counts.values()]
        by_sentences = Cell(list(units.values()), RATIO)
        cells |= {"mean_hal_ratio": by_sentences, "hal_sents_ratio": by_sentences}
        cells |= {"hal_words_ratio": Cell(by_words, RATIO)}
    unread = sum(text.labels is None for text in judged.values())
    return {
        "table": {"all": _rounded(found | repetition, mode)},
        "cells": {"all": cells},
        "rows": Rows({index: _row_score(judged.get(index), counts.get(index)) for index in answers}),
        "units": units,
        "unparsed": unread,
        "metric": "hallucinated sentences (fewer are better)",
        "statistic": RATIO,
        "notes": {"images_judged": len(judged) - unread, "images_left_out": len(answers) - len(judged)},
        "attachments": _attachments(found | repetition, judged, replies, answers),
    }


def _prompt(instruction: str, row: Row, sentences: Sequence[str]) -> str:
    numbered = (f"{number}. {' '.join(sentence.split())}" for number, sentence in enumerate(sentences, start=1))
    return instruction.format(
        regions=row.cells["regions"], facts=row.cells["facts"] or "none", sentences="\n".join(numbered)
    )


def _replies(
    table: Table, texts: Mapping[int | str, JudgedText], instruction: str, judge: SentenceJudge, mode: Mode
) -> dict[int | str, str | None]:
    """The judge's reply on each image that is asked about; None where it has none. compat leaves out what HA-DPO does:
    long prompts, and so images without a reply in its file."""
    replies: dict[int | str, str | None] = {}
    rows = [row for row in table.rows if row.index in texts]
    with progress_bar("judge", len(rows)) as advance:
        for row in rows:
            sentences = texts[row.index].sentences
            prompt = _prompt(instruction, row, sentences)
            if mode == "strict" or len(prompt) <= LONGEST_PROMPT:
                is_read = partial(_is_read, count=len(sentences))
                reply = judge.verdicts(str(row.index), sentences, prompt, is_read) if sentences else ""
                if mode == "strict" or reply is not None:
                    replies[row.index] = reply
            advance(1)
    _refuse_no_verdict(replies, texts)
    return replies


def _refuse_no_verdict(replies: Mapping[int | str, str | None], texts: Mapping[int | str, JudgedText]) -> None:
    if any(reply and _is_read(reply, len(texts[index].sentences)) for index, reply in replies.items()):
        return
    last = next((reply for reply in reversed(replies.values()) if reply), None)
    raise DataError(
        f"the judge gave no verdict that can be read on any of {len(replies)} images; its last reply is {last!r:.200}, "
        f'expected a line "{MARK}:" and then a numbered line for each sentence. Answers are kept: use a judge that '
        "follows instructions, or leave out --judge."
    )


def _is_read(reply: str, count: int) -> bool:
    """Whether either mode finds a label for each sentence."""
    return strict_labels(reply, count) is not None or set(compat_labels(reply, count) or [""]) <= set(LABELS)


def _row_score(text: JudgedText | None, counts: Mapping[str, int] | None) -> RowScore:
    if text is None or counts is None:
        return RowScore(None, 0.0, "left out: the prompt is long, or there is no verdict")
    if text.labels is None:
        return RowScore(None, 0.0, "no verdict that can be read; not counted")
    wrong, labelled = counts["hal_sentences"], counts["labelled_sentences"]
    log = "; ".join(f"{number}. {label}" for number, label in enumerate(text.labels, start=1))
    return RowScore(f"{wrong} of {labelled} hallucinated", 1 - wrong / labelled if labelled else 1.0, log)


def _attachments(
    found: Mapping[str, float],
    judged: Mapping[int | str, JudgedText],
    replies: Mapping[int | str, str | None],
    answers: Mapping[int | str, str],
) -> dict[str, Any]:
    """HA-DPO's two files; the first one is also a judge of the same answers (evaluation.recorded_judge)."""
    verdicts = {
        str(index): {
            "raw_judgement": replies[index],
            "model_response": answers[index],
            "judgement": [
                {"model_response": f"{sentence}.", "classification": label}
                for sentence, label in zip(text.sentences, text.labels or [None] * len(text.sentences), strict=True)
            ],
        }
        for index, text in judged.items()
        if replies[index] is not None
    }
    numbers = {name: None if math.isnan(value) else round(value, DIGITS) for name, value in found.items()}
    outside = {name: value for name, value in numbers.items() if name.startswith("gram-") or name == "mean_hal_ratio"}
    run = {name: value for name, value in numbers.items() if name not in outside}
    return {"judgement": {RUN: verdicts}, "metrics": {RUN: run} | outside}


def _rounded(numbers: Mapping[str, float], mode: Mode) -> dict[str, float]:
    """compat: HA-DPO's three digits."""
    return {name: round(value, DIGITS) if mode == "compat" else value for name, value in numbers.items()}


BENCHMARK = SHR()
