"""Boxes in text and their overlap, in the form of Shikra's referring-expression task (REC; Chen et al., 2023).

A box is (left, top, right, bottom), 0..1 of the image padded to a square; in text [0.123,0.456,0.789,1.000].
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

from mindspeed_mm.data.grounding.geometry import ExpandToSquare, fractions, moved
from mindspeed_mm.data.grounding.notation import MARKS, PRECISION, BinNotation, BracketNotation, Brackets

Box = Sequence[float]
IOU_THRESHOLD = 0.5
PLACEHOLDER = "<boxes>"
FAILED_BOX = (0.0, 0.0, 0.0, 0.0)
"""Stands for an answer without exactly one readable box; its overlap is 0."""


def format_boxes(boxes: Sequence[Box], brackets: Brackets = "square", precision: int = PRECISION) -> str:
    """Text of one or more boxes: fixed decimals, no spaces, joined by ";"."""
    return BracketNotation(brackets, precision).format(boxes)


def extract_boxes(text: str, brackets: Brackets = "square", size: int = 4) -> list[list[list[float]]]:
    """All groups of boxes (size 4) or points (size 2) in the text."""
    return BracketNotation(brackets).parse(text, size)


def format_token_boxes(boxes: Sequence[Box], bins: int) -> str:
    """Text of boxes as words <bin_0> .. <bin_{bins-1}> between begin, separator and end words."""
    return BinNotation(bins).format(boxes)


def extract_token_boxes(text: str, bins: int) -> list[list[list[float]]]:
    """All groups of boxes in the text; spaces between the words do not matter."""
    return BinNotation(bins).parse(text)


def norm_box(box: Box, width: float, height: float) -> list[float]:
    """A box in pixels as fractions of the image, clamped to 0..1 and rounded to three decimals."""
    return fractions(box, width, height)


def pad_box(box: Box, width: int, height: int) -> list[float]:
    """A box in pixels after the shorter side of its image was padded to a square."""
    return list(moved(box, (width, height), (ExpandToSquare(),)))


def fill_placeholders(
    text: str,
    boxes: Sequence[Box],
    sequence: Sequence[Sequence[int]],
    width: float,
    height: float,
    brackets: Brackets = "square",
) -> str:
    """Replace each <boxes> by the boxes (pixels) that the same entry of `sequence` names.

    Raises ValueError when the numbers of placeholders and entries differ.
    """
    pieces = text.split(PLACEHOLDER)
    if len(pieces) - 1 != len(sequence):
        raise ValueError(
            f"found {len(pieces) - 1} {PLACEHOLDER} placeholders and {len(sequence)} entries; give as many."
        )
    filled = pieces[0]
    for numbers, piece in zip(sequence, pieces[1:], strict=True):
        filled += format_boxes([norm_box(boxes[i], width, height) for i in numbers], brackets) + piece
    return filled


def read_box(text: str, brackets: Brackets | None = None) -> list[float] | None:
    """The one box of an answer, None if there is none or more.

    Without `brackets` all of Shikra's forms are read: both kinds of brackets, and words.
    """
    kinds = (brackets,) if brackets else tuple(MARKS)
    groups = [group for kind in kinds for group in extract_boxes(text, kind)]
    groups += [] if brackets else BinNotation().parse(text)
    return groups[0][0] if len(groups) == 1 and len(groups[0]) == 1 else None


def iou(first: Box, second: Box) -> float:
    """Intersection over union in float32 on the box times 1000, as the public metric computes it.

    nan for two boxes without area.
    """
    a, b = (np.asarray(box, dtype=np.float32) * np.float32(1000) for box in (first, second))
    inner = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inner
    return float(inner / union) if union else math.nan


def exact_iou(first: Box, second: Box) -> Fraction:
    """Intersection over union of the decimal numbers as written; 0 for an empty union."""
    boxes = [[Fraction(str(value)) for value in box] for box in (first, second)]
    (a, b), zero = boxes, Fraction(0)
    inner = max(min(a[2], b[2]) - max(a[0], b[0]), zero) * max(min(a[3], b[3]) - max(a[1], b[1]), zero)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in boxes) - inner
    return inner / union if union else zero


def rec_metrics(
    predictions: Sequence[str],
    targets: Sequence[str],
    brackets: Brackets | None,
    *,
    strict: bool,
    read: Callable[[str, Brackets | None], list[float] | None] = read_box,
) -> dict[str, float]:
    """Accuracy (IoU > 0.5), mean IoU and parse failures; `read` finds the one box of a text.

    Public rule: unreadable targets stay in the accuracy's denominator. Strict: over readable targets, exact arithmetic.
    Raises IndexError (public rule only) when no target is readable, as the public code does.
    """
    overlaps, failed, target_failed = [], 0, 0
    for prediction, target in zip(predictions, targets, strict=True):
        box, gold = read(prediction, brackets), read(target, brackets)
        if gold is None:
            target_failed += 1
            continue
        failed += box is None
        overlaps.append((exact_iou if strict else iou)(box or FAILED_BOX, gold))
    if not overlaps and not strict:
        raise IndexError("no target has a readable box")
    count = len(overlaps) if strict else len(targets)
    return {
        "accuracy": float(sum(overlap > IOU_THRESHOLD for overlap in overlaps) / count) if count else 0.0,
        "target_failed": target_failed,
        "failed": failed,
        "iou": float(sum(overlaps) / len(overlaps)) if overlaps else 0.0,
    }
