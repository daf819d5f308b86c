"""A small multiple-choice table and an engine that answers from a dictionary."""

import base64
import csv
import io

from PIL import Image


def image_cell(colour: str = "red", size: tuple[int, int] = (4, 3), mode: str = "RGB") -> str:
    """Base64 of a PNG."""
    data = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def write_table(path, rows, **csv_options):
    """Write rows (dicts with equal keys) as a TSV and return its path."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t", lineterminator="\n", **csv_options)
        writer.writeheader()
        writer.writerows(rows)
    return path


def choice_rows(count: int = 6) -> list[dict[str, str]]:
    """Rows whose right answers are A, B, A, B, ...; every third one is of category "y"."""
    return [
        {
            "index": str(number),
            "image": image_cell() if number % 2 == 0 else str(number - 1),
            "question": f"Question {number}{' and more' * number}?",
            "A": "cat",
            "B": "dog",
            "C": "" if number % 2 else "None",
            "answer": "AB"[number % 2],
            "category": "y" if number % 3 == 0 else "x",
        }
        for number in range(count)
    ]


class FakeEngine:
    """Answers from a dictionary; fails after `fails_after` answers, and notes what it was asked."""

    def __init__(self, answers, *, name="fake", fails_after=None):
        self.answers, self.name, self.fails_after = answers, name, fails_after
        self.asked, self.images = [], []

    def describe(self):
        return {"weights": self.name, "template": "v1", "decoding": {"max_new_tokens": 4}}

    def generate(self, requests, batch_size):
        for request in reversed(requests):
            if self.fails_after is not None and len(self.asked) >= self.fails_after:
                raise KeyboardInterrupt
            self.asked.append(request)
            self.images.append([image.copy() for image in request.images()])
            yield request.id, self.answers[request.id]
