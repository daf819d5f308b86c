"""Boxes drawn on an image: true ones green, those that a model said red and dashed, those of the question blue."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import PIL.Image
import PIL.ImageDraw

Box = Sequence[float]
TRUE, SAID, ASKED = "#1b9e3e", "#e31a1c", "#1f5fd0"
SHOWN_SIDE = 224
"""Longer side of a drawn image in pixels; smaller ones are enlarged, so that lines are thin beside them."""

DASH, RADIUS = 6, 4


class DrawnBoxes(NamedTuple):
    """Boxes of one image, 0..1 of the image padded to a square."""

    true: Box
    said: Box | None
    """None where the answer has no readable box."""


def on_image(box: Box, width: int, height: int) -> list[float]:
    """A box of the padded square in pixels of an image of that size, cut to the image."""
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    sides, offsets = (width, height) * 2, (left, top) * 2
    return [min(max(value * side - offset, 0.0), end) for value, offset, end in zip(box, offsets, sides, strict=True)]


def with_boxes(image: PIL.Image.Image, boxes: DrawnBoxes) -> PIL.Image.Image:
    """The image in RGB, `SHOWN_SIDE` pixels on its longer side, with the boxes on it."""
    said = [] if boxes.said is None else [boxes.said]
    marks = [
        Marks([on_image(box, *image.size) for box in found], colour)
        for found, colour in (([boxes.true], TRUE), (said, SAID))
    ]
    return with_marks(image, marks, numbered=False)


class Marks(NamedTuple):
    """Boxes (4 numbers) and points (2) in pixels of an image, in one colour."""

    entries: Sequence[Box]
    colour: str


def with_marks(image: PIL.Image.Image, marks: Sequence[Marks], *, numbered: bool = True) -> PIL.Image.Image:
    """The image in RGB, `SHOWN_SIDE` pixels on its longer side, with these on it; SAID is dashed. Several of one colour
    are `numbered` from 1."""
    scale = SHOWN_SIDE / max(image.size)
    shown = image.convert("RGB").resize([max(1, round(side * scale)) for side in image.size])
    draw = PIL.ImageDraw.Draw(shown)
    for entries, colour in marks:
        for number, entry in enumerate(entries, start=1):
            place = [value * scale for value in entry]
            corner = _mark(draw, place, colour)
            if numbered and len(entries) > 1:
                draw.text(corner, str(number), fill=colour, stroke_width=2, stroke_fill="white")
    return shown


def encoded(image: PIL.Image.Image) -> str:
    """The image as base64 of a JPEG, for a page."""
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    return base64.b64encode(data.getvalue()).decode("ascii")


def _mark(draw: PIL.ImageDraw.ImageDraw, place: Sequence[float], colour: str) -> tuple[float, float]:
    """Draw a box or a point. Returns where its number goes."""
    if len(place) == 2:
        x, y = place
        draw.ellipse((x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS), outline=colour, width=2)
        return x + RADIUS + 2, y - RADIUS
    left, top, right, bottom = _ordered(place)
    if colour != SAID:
        draw.rectangle((left, top, right, bottom), outline=colour, width=2)
        return left + 4, top + 2
    for start, end in (
        ((left, top), (right, top)),
        ((right, top), (right, bottom)),
        ((right, bottom), (left, bottom)),
        ((left, bottom), (left, top)),
    ):
        _dashed(draw, start, end)
    return right - 10, bottom - 13


def _ordered(box: Sequence[float]) -> list[float]:
    """A model may say right before left, which Pillow does not draw."""
    return [*map(min, box[:2], box[2:]), *map(max, box[:2], box[2:])]


def _dashed(draw: PIL.ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float]) -> None:
    length = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
    count = max(1, int(length // DASH))
    places = [
        tuple(a + (b - a) * number / count for a, b in zip(start, end, strict=True)) for number in range(count + 1)
    ]
    for number in range(0, count, 2):
        draw.line([places[number], places[number + 1]], fill=SAID, width=2)
