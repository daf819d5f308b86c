"""What happens to boxes and points when their image is padded, resized or cropped.

A step knows the size (width, height) of the image after it and where a point goes. Steps are applied one behind the
other by `moved`. Coordinates are pixels with the origin at the upper left corner of the first pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

PRECISION = 3
"""Decimals of a normalised box, as in Shikra."""

Size = tuple[int, int]


class BoxStep(Protocol):
    """One change of an image."""

    def size(self, size: Size) -> Size:
        """(width, height) of the image after it."""
        ...

    def point(self, x: float, y: float, size: Size) -> tuple[float, float]:
        """Where a point of an image of `size` lies after it."""
        ...


@dataclass(frozen=True)
class ExpandToSquare:
    """The shorter side is padded on both sides, by whole pixels, the odd one behind."""

    def size(self, size: Size) -> Size:
        """As BoxStep."""
        return max(size), max(size)

    def point(self, x: float, y: float, size: Size) -> tuple[float, float]:
        """As BoxStep."""
        side = max(size)
        return x + (side - size[0]) // 2, y + (side - size[1]) // 2


@dataclass(frozen=True)
class Resize:
    """To a width and height."""

    width: int
    height: int

    def size(self, size: Size) -> Size:
        """As BoxStep."""
        return self.width, self.height

    def point(self, x: float, y: float, size: Size) -> tuple[float, float]:
        """As BoxStep."""
        return x * self.width / size[0], y * self.height / size[1]


@dataclass(frozen=True)
class ResizeShortest:
    """The shorter side becomes `side`, the longer one follows, cut to whole pixels (CLIP's "shortest_edge")."""

    side: int

    def size(self, size: Size) -> Size:
        """As BoxStep."""
        width, height = size
        longer = int(self.side * max(size) / min(size))
        return (self.side, longer) if width <= height else (longer, self.side)

    def point(self, x: float, y: float, size: Size) -> tuple[float, float]:
        """As BoxStep."""
        return Resize(*self.size(size)).point(x, y, size)


@dataclass(frozen=True)
class Crop:
    """A rectangle of the image; also a tile. It may reach over the edges, where the image is padded."""

    left: int
    top: int
    width: int
    height: int

    def size(self, size: Size) -> Size:
        """As BoxStep."""
        return self.width, self.height

    def point(self, x: float, y: float, size: Size) -> tuple[float, float]:
        """As BoxStep."""
        return x - self.left, y - self.top


@dataclass(frozen=True)
class CentreCrop:
    """CLIP's crop: `width` x `height` from the middle."""

    width: int
    height: int

    def size(self, size: Size) -> Size:
        """As BoxStep."""
        return self.width, self.height

    def point(self, x: float, y: float, size: Size) -> tuple[float, float]:
        """As BoxStep."""
        return x - (size[0] - self.width) // 2, y - (size[1] - self.height) // 2


def moved(entry: Sequence[float], size: Size, steps: Sequence[BoxStep]) -> tuple[float, ...]:
    """A box (4 numbers) or point (2), in pixels of an image of `size`, after all steps. It may lie outside."""
    corners = list(zip(entry[0::2], entry[1::2], strict=True))
    for step in steps:
        corners = [step.point(x, y, size) for x, y in corners]
        size = step.size(size)
    return tuple(number for corner in corners for number in corner)


def final_size(size: Size, steps: Sequence[BoxStep]) -> Size:
    """(width, height) after all steps."""
    for step in steps:
        size = step.size(size)
    return size


def fractions(entry: Sequence[float], width: float, height: float, decimals: int | None = PRECISION) -> list[float]:
    """A box or point in pixels as fractions of the image, cut to 0..1 and rounded; `decimals` None: not rounded."""
    sides = (width, height) * (len(entry) // 2)
    found = [max(0.0, min(value / side, 1.0)) for value, side in zip(entry, sides, strict=True)]
    return found if decimals is None else [round(value, decimals) for value in found]
