"""Tiles of images of any size (LLaVA-NeXT): what follows from a size alone. Pure integers, no tensors.

Sizes are (height, width). Equal to transformers' select_best_resolution, get_patch_output_size and unpad_image, whose
roundings are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Window(NamedTuple):
    """The part of a grid of features that shows the image and not its borders."""

    top: int
    height: int
    left: int
    width: int


def best_resolution(size: tuple[int, int], pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The pinpoint that keeps most of an image's pixels, and among equals wastes fewest of its own."""
    height, width = size
    best, most, least = None, 0, math.inf
    for target_height, target_width in pinpoints:
        scale = min(target_width / width, target_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = target_height * target_width - kept
        if kept > most or (kept == most and wasted < least):
            best, most, least = (target_height, target_width), kept, wasted
    return best


def resized_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """An image's size inside `target`, in its own proportions."""
    (height, width), (target_height, target_width) = size, target
    scale_height, scale_width = target_height / height, target_width / width
    if scale_width < scale_height:
        return min(math.ceil(height * scale_width), target_height), target_width
    return target_height, min(math.ceil(width * scale_height), target_width)


def tile_grid(size: tuple[int, int], pinpoints: Sequence[tuple[int, int]], side: int) -> tuple[int, int]:
    """Rows and columns of tiles of `side` pixels that an image becomes."""
    height, width = best_resolution(size, pinpoints)
    return height // side, width // side


def unpadded(size: tuple[int, int], grid: tuple[int, int]) -> Window:
    """What of a grid of features (height, width) belongs to an image of this size."""
    (height, width), (rows, columns) = size, grid
    if width / height > columns / rows:
        border = (rows - int(round(height * (columns / width), 7))) // 2
        return Window(border, rows - 2 * border, 0, columns)
    border = (columns - int(round(width * (rows / height), 7))) // 2
    return Window(0, rows, border, columns - 2 * border)


UNPAD = "spatial_unpad"
"""mm_patch_merge_type of LLaVA-1.6's releases: lines of all tiles without the image's borders, each with the newline
vector at its end. "spatial" has the lines whole and no vector, "flat" the tiles one behind the other."""


def tile_features(size: tuple[int, int], grid: tuple[int, int], patches: int, merge: str = UNPAD) -> int:
    """Features of an image of `grid` tiles, each of `patches` x `patches`: those of the whole image, and those of the
    tiles as `merge` (mm_patch_merge_type) puts them together."""
    if merge != UNPAD:
        return patches**2 * (1 + grid[0] * grid[1])
    window = unpadded(size, (grid[0] * patches, grid[1] * patches))
    return patches**2 + window.height * (window.width + 1)
