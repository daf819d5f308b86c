"""Canvases with handwritten digits, and the files that ask where one of them is.

A canvas holds a few of scikit-learn's scans, of different digits; the box of a digit is the square of its scan.
Held-out scans are the quickstart's: no canvas that is trained on shows one of them.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from examples.quickstart.make_data import NAMES, held_out_indices

SIDE = 32
"""Pixels of a canvas."""

SIZE = 8
"""Pixels of a scan, which is placed as it is."""

STEP = 8
"""Boxes begin at multiples of so many pixels, where the patches of the encoder begin."""

TRIALS = 50
"""How often a place is drawn before the canvas is begun anew."""

WHITE = 255
QUESTION = "Where is <expr> in <image>? Answer with its box."
"""The benchmark's."""

ANSWER = "<expr> <boxes>"
"""Says the phrase again and then where it is, as captions with boxes do. So the box follows the token of the name."""


@dataclass(frozen=True)
class Canvas:
    """A grey image [SIDE, SIDE], uint8, dark ink on white, with its digits and their boxes in pixels."""

    pixels: np.ndarray
    digits: tuple[int, ...]
    boxes: tuple[tuple[int, int, int, int], ...]


class Scans:
    """The scans of some rows of scikit-learn's set."""

    def __init__(self, rows: Sequence[int]) -> None:
        digits = load_digits()
        self.rows = list(rows)
        self.labels = digits.target
        self.inks = ink(digits.images)

    def canvas(self, count: int, rng: random.Random) -> Canvas:
        """`count` different digits on one canvas; their boxes do not overlap."""
        while True:
            placed = self._placed(count, rng)
            if len(placed) == count:
                break
        pixels = np.full((SIDE, SIDE), WHITE, np.uint8)
        for row, (left, top, right, bottom) in placed.items():
            pixels[top:bottom, left:right] = self.inks[row]
        return Canvas(pixels, tuple(int(self.labels[row]) for row in placed), tuple(placed.values()))

    def _placed(self, count: int, rng: random.Random) -> dict[int, tuple[int, int, int, int]]:
        """Rows and boxes; fewer than `count` where no place was found."""
        placed: dict[int, tuple[int, int, int, int]] = {}
        for _ in range(TRIALS):
            row, left, top = rng.choice(self.rows), *(STEP * rng.randint(0, (SIDE - SIZE) // STEP) for _ in range(2))
            box = left, top, left + SIZE, top + SIZE
            taken = any(self.labels[row] == self.labels[other] for other in placed)
            if not taken and all(apart(box, other) for other in placed.values()):
                placed[row] = box
            if len(placed) == count:
                break
        return placed


def ink(scans: np.ndarray) -> np.ndarray:
    """Scans [..., 8, 8] (values 0 to 16, ink is high) as dark ink on white, uint8."""
    return np.round(WHITE * (1.0 - scans / 16.0)).astype(np.uint8)


def apart(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two boxes do not overlap."""
    return first[2] <= second[0] or second[2] <= first[0] or first[3] <= second[1] or second[3] <= first[1]


def expression(digit: int) -> str:
    """What the question calls a digit."""
    return f"the {NAMES[digit]}"


def rows_of(held_out: bool) -> list[int]:
    """Rows of scikit-learn's set: those of the quickstart's benchmark, or all others."""
    labels = load_digits().target
    kept = set(held_out_indices(labels))
    return [row for row in range(len(labels)) if (row in kept) == held_out]


def write_images(folder: Path, name: str, canvases: Sequence[Canvas]) -> list[str]:
    """Writes the canvases into `folder`/images; returns the names of the files."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    files = [f"{name}_{number:05d}.png" for number in range(len(canvases))]
    for file, canvas in zip(files, canvases, strict=True):
        Image.fromarray(canvas.pixels).save(images / file)
    return files


def write_questions(folder: Path, name: str, canvases: Sequence[Canvas]) -> int:
    """Writes images and NAME.jsonl, REC in Shikra's form, and asks for the first digit of each canvas, which chance put
    there. Returns the number of questions."""
    lines = [
        {"img_path": file, "expression": expression(canvas.digits[0]), "bbox": list(canvas.boxes[0])}
        for file, canvas in zip(write_images(folder, name, canvases), canvases, strict=True)
    ]
    write_lines(folder / f"{name}.jsonl", lines)
    return len(lines)


def write_lessons(folder: Path, name: str, canvases: Sequence[Canvas]) -> int:
    """Writes images and NAME.jsonl, a grounding item for every digit of every canvas: the question for its box, and the
    answer. Returns the number of items."""
    lines = []
    for file, canvas in zip(write_images(folder, name, canvases), canvases, strict=True):
        for digit, box in zip(canvas.digits, canvas.boxes, strict=True):
            question, answer = (text.replace("<expr>", expression(digit)) for text in (QUESTION, ANSWER))
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer, "boxes_seq": [[0]]}]
            lines.append({"image": file, "target": {"boxes": [box]}, "conversations": turns})
    write_lines(folder / f"{name}.jsonl", lines)
    return len(lines)


def write_lines(path: Path, records: Sequence[dict]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
