"""Metrics of the sets that a data.json names under `prediction`: answers against the answers of the records."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from evaluation.scorers.boxes import rec_metrics
from evaluation.scorers.captions import Caption, caption_scores, caption_words
from evaluation.scorers.final_answer import exact_metrics
from mindspeed_mm.data.grounding.notation import Notation, notation, parse_lenient


def set_metrics(
    metric: str | None,
    predictions: Sequence[str],
    targets: Sequence[str],
    style: Notation | None = None,
    *,
    lenient: bool = False,
) -> dict[str, float]:
    """The values of a metric (data/prediction.py) by name; none for None. `style`: how the set writes its boxes.
    `lenient`: boxes that are written otherwise are read, too, and counted."""
    if metric is None:
        return {}
    if metric == "rec":
        style = style or notation("square")
        if not lenient:
            return rec_metrics(predictions, targets, None, strict=True, read=partial(_one_box, style))
        found = [parse_lenient(text, style) for text in predictions]
        plain = [style.format(groups[0]) if len(groups) == 1 else "" for groups, _ in found]
        values = rec_metrics(plain, targets, None, strict=True, read=partial(_one_box, style))
        return values | {"lenient": sum(needed for _, needed in found)}
    if metric == "caption":
        return _captions(predictions, targets)
    return exact_metrics(predictions, targets, "point_qa" if metric == "point_qa" else "sentence")


def _one_box(style: Notation, text: str, _: Any) -> list[float] | None:
    """The one box of a text in a notation, None if there is none or more."""
    groups = style.parse(text)
    return groups[0][0] if len(groups) == 1 and len(groups[0]) == 1 else None


def _captions(predictions: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    pairs = zip(predictions, targets, strict=True)
    scores = caption_scores([Caption(caption_words(said), [caption_words(wanted)]) for said, wanted in pairs])
    return {"cider": scores.cider} | {f"bleu_{order}": value for order, value in enumerate(scores.bleu, start=1)}
