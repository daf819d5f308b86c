"""The page of a predicted set: each image with the boxes of its question, of the right answer and of what was said.

Boxes are found in the texts, in the notation of the set, or in any where the set names none (MiniGPT-v2's tasks come as
conversations with `{<x><y><x><y>}` in them). They are fractions of the image as the model sees it, and are drawn where
they lie on the stored one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image

from evaluation.charts import template
from evaluation.drawing import ASKED, SAID, TRUE, Marks, encoded, with_marks
from evaluation.wording import cut
from mindspeed_mm.data.grounding.geometry import BoxStep, final_size, moved
from mindspeed_mm.data.grounding.notation import NOTATIONS, Notation
from mindspeed_mm.data.image import load_image
from mindspeed_mm.data.sample import Sample
from mindspeed_mm.errors import DataError

MAX_ROWS = 200
"""Records shown, the first ones: with their images a longer page would not open."""

SHOWN = 800
"""Characters of a text that are shown."""


def render_predictions(
    prefix: str,
    samples: Sequence[Sample],
    answers: Sequence[str],
    values: Mapping[str, float],
    style: Notation | None,
    steps: Sequence[BoxStep],
) -> str:
    """The page of the first records of a set. Equal results, equal text."""
    shown = zip(samples[:MAX_ROWS], answers[:MAX_ROWS], strict=True)
    rows = [_row(sample, answer, style, steps) for sample, answer in shown]
    return template("predicted.html.jinja").render(
        prefix=prefix,
        values=values,
        rows=rows,
        total=len(answers),
        colours={"the question's": ASKED, "the right answer's": TRUE, "what was said (dashed)": SAID},
    )


def _row(sample: Sample, answer: str, style: Notation | None, steps: Sequence[BoxStep]) -> dict[str, Any]:
    *before, last = [turn.text for turn in sample.turns]
    question, problem, images = "\n".join(before), "", []
    try:
        for image in map(load_image, sample.images):
            marks = _marks((question, last, answer), image, style, steps) if len(sample.images) == 1 else []
            images.append(encoded(with_marks(image, marks)))
    except DataError as error:
        problem = str(error)
    texts = {"question": question, "truth": last, "answer": answer}
    return {"where": sample.where.rpartition("/")[2], "images": images, "problem": problem} | {
        name: cut(text, SHOWN) for name, text in texts.items()
    }


def _marks(
    texts: Sequence[str], image: PIL.Image.Image, style: Notation | None, steps: Sequence[BoxStep]
) -> list[Marks]:
    """Boxes and points of question, right answer and answer, in pixels of the stored image."""
    colours = zip(texts, (ASKED, TRUE, SAID), strict=True)
    return [
        Marks([stored_place(entry, image.size, steps) for entry in found_entries(text, style)], colour)
        for text, colour in colours
    ]


def found_entries(text: str, style: Notation | None) -> list[list[float]]:
    """Boxes and points of a text, by the notation, or without one by the first that reads anything."""
    for one in [style] if style is not None else NOTATIONS.values():
        found = [entry for size in (4, 2) for group in one.parse(text, size) for entry in group]
        if found:
            return found
    return []


def stored_place(entry: Sequence[float], size: tuple[int, int], steps: Sequence[BoxStep]) -> list[float]:
    """Fractions of the image after `steps` as pixels of the stored one of `size` (width, height), cut to it.

    Every step moves x and y by a straight line of their own, which two points tell.
    """
    width, height = final_size(size, steps)
    x0, y0, x1, y1 = moved((0, 0, *size), size, steps)
    lines = ((x0, x1 - x0, size[0], width), (y0, y1 - y0, size[1], height)) * (len(entry) // 2)
    return [
        min(max((value * whole - start) / length * side, 0.0), float(side))
        for value, (start, length, side, whole) in zip(entry, lines, strict=True)
    ]
