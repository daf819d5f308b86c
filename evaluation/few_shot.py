"""Examples in front of each question: questions with their right answers, drawn from a support table.

Each question has draws of its own, from the seed and its index alone, so that every rank and every resume shows the
same ones. The question itself is never among them.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import PIL.Image

from evaluation.benchmark import Benchmark
from evaluation.identity import CHOICE, TEXT, YES_NO
from evaluation.prompts import Prompt, PromptStyle
from evaluation.questions import read_questions
from evaluation.scorers.cells import strict_answers
from evaluation.tsv import Row, Table
from mindspeed_mm.errors import DataError

CAPTIONS = "captions"
KINDS = (TEXT, CHOICE, YES_NO, CAPTIONS)
"""What the answers of an example can be taken from."""

TRAIN = "train"
"""Split of a table's own examples."""

MAX_SHOTS = 64


@dataclass(frozen=True)
class Shots:
    """What is asked for: `number` examples before each question."""

    number: int
    path: str | Path | None = None
    """The support table; None: the rows of the evaluated table whose split is "train"."""

    seed: int = 0
    image_root: str | Path | None = None
    """Folder of the support table's images, as of the evaluated one's."""

    def __post_init__(self) -> None:
        if not 1 <= self.number <= MAX_SHOTS:
            raise DataError(f"found {self.number} shots; expected 1 to {MAX_SHOTS}, or none.")

    @cached_property
    def given(self) -> Table | None:
        """The support table, read once. Raises DataError."""
        return None if self.path is None else read_questions(self.path, image_root=self.image_root)

    def support(self, benchmark: Benchmark, table: Table) -> tuple[Table, list[Row]]:
        """The table of the examples and its rows with an answer. Raises DataError where there are too few of them, and
        for a benchmark whose answers cannot be shown."""
        if getattr(benchmark, "kind", None) not in KINDS:
            raise DataError(
                f"{benchmark.name} has no examples: its answers are no texts of the table. Expected a benchmark of "
                f"{', '.join(KINDS)}; leave out --shots."
            )
        source = self.given or table
        rows = [row for row in source.rows if row.cells.get("answer", "").strip()]
        if self.given is None:
            rows = [row for row in rows if row.cells.get("split", "").strip().lower() == TRAIN]
        else:
            benchmark.check(source)
        if len(rows) < self.number:
            wanted = "" if self.given else ' and "train" in column split'
            raise DataError(
                f"{source.path} has {len(rows)} rows with an answer{wanted}; expected at least {self.number}, from "
                f"which --shots {self.number} are drawn. Give another --shots-table, or fewer shots."
            )
        return source, rows


class Examples:
    """The examples of every question of a run."""

    def __init__(
        self,
        shots: Shots,
        benchmark: Benchmark,
        table: Table,
        prompts: Mapping[int | str, Prompt],
        style: PromptStyle,
    ):
        """Draw them; `prompts` are those without examples. Raises DataError (see Shots.support)."""
        if style != "official":
            raise DataError(f"found prompt style {style!r} with shots; expected official, whose prompts are turns.")
        self._table, self._shots = table, shots
        self._support, rows = shots.support(benchmark, table)
        asked = prompts if self._support is table else benchmark.prompts(self._support, style)
        questions = [(row, _only_turn(asked[row.index])) for row in rows]
        is_same = self._support.sha256 == table.sha256
        self._rows: dict[int | str, tuple[Row, ...]] = {}
        self.prompts: dict[int | str, Prompt] = {}
        """With the examples as earlier turns, by index."""
        for row in table.rows:
            question = _only_turn(prompts[row.index])
            drawn = self._drawn(row, question, questions, is_same)
            turns = [(text, _answer(benchmark, example)) for example, text in drawn]
            self._rows[row.index] = tuple(example for example, _ in drawn)
            self.prompts[row.index] = Prompt(turns=(*turns, (question, None)))

    def _drawn(self, row: Row, question: str, rows: list[tuple[Row, str]], is_same: bool) -> list[tuple[Row, str]]:
        draw = random.Random(f"{self._shots.seed} {row.index}")
        image = _image_name(row)
        seen: set[int] = set()
        found: list[tuple[Row, str]] = []
        while len(found) < self._shots.number:
            if len(seen) == len(rows):
                raise DataError(
                    f"{self._support.path} has {len(found)} examples for the question with index {row.index}, once "
                    f"that question is left out; expected {self._shots.number}. Give a larger --shots-table, or fewer "
                    "shots."
                )
            number = draw.randrange(len(rows))
            example, text = rows[number]
            is_itself = (is_same and example.index == row.index) or (text == question and _image_name(example) == image)
            if number not in seen and not is_itself:
                found.append(rows[number])
            seen.add(number)
        return found

    def images(self, row: Row) -> tuple[PIL.Image.Image, ...]:
        """The images of the examples and of the question, in reading order. Raises DataError."""
        shown = [image for example in self._rows[row.index] for image in self._support.images(example)]
        return (*shown, *self._table.images(row))

    def image_key(self, row: Row) -> str:
        """Equal for questions on equal images with equal examples."""
        names = [example.image for example in self._rows[row.index]] + [row.image]
        return hashlib.blake2b(json.dumps(names).encode(), digest_size=16).hexdigest()

    @property
    def facts(self) -> dict[str, Any]:
        """What the answers depend on, for the run's fingerprint."""
        facts = {
            "shots": self._shots.number,
            "shots_seed": self._shots.seed,
            "shots_table": self._support.path.name,
            "shots_table_sha256": self._support.sha256,
        }
        sizes = self._support.image_sizes()
        return facts if sizes is None else facts | {"shots_image_sizes": sizes}


def _only_turn(prompt: Prompt) -> str:
    assert prompt.turns is not None  # of the style official
    return prompt.turns[0][0]


def _image_name(row: Row) -> str:
    """What tells images apart: a file's name in any folder, or the digest of what the table holds."""
    return PurePosixPath(row.cells["image_path"]).name if "image_path" in row.cells else row.image


def _answer(benchmark: Benchmark, row: Row) -> str:
    """The right answer as a model would give it: a letter, a word, or the one that most people gave (the first of
    those that as many gave)."""
    truth = getattr(benchmark, "truth", None)
    if truth is not None:
        return truth(row.cells)
    return Counter(strict_answers(row.cells["answer"])).most_common(1)[0][0].strip()
