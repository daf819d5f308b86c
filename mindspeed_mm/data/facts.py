"""What is known of every record of a data set once it has been checked: enough to judge its length roughly and to find
the ones without answers, without reading them again."""

from __future__ import annotations

from typing import Any

import numpy as np

from mindspeed_mm.data.keys import digest
from mindspeed_mm.data.parallel import count_all
from mindspeed_mm.data.rendering import render_turns
from mindspeed_mm.data.sample import Sample
from mindspeed_mm.data.template_form import Template

COLUMNS = 4
"""Text bound (see sample_facts), images, answers that are missing or empty, unused keys (see keys.digest)."""

ANSWER = '{"from": "gpt", "value": "A cat."}'


def sample_facts(sample: Sample, template: Template) -> tuple[int, ...]:
    """(most tokens that its text can have, images, answers without text, digest of its unused keys).

    A conversation without an answer counts as one without text. Raises DataError where the template has no place for
    the conversation.

    A token covers a byte of the text at least, up to the ones without width at the start of each piece.
    """
    pieces = 4 * (1 + len(sample.turns) + len(sample.images))
    sides = [sample.turns] if sample.rejected is None else [sample.turns, sample.rejected]
    bound = max(len(render_turns(turns, template).encode()) for turns in sides) + pieces
    answers = [turn.text for turn in sample.turns if turn.role == "gpt"]
    empty = sum(not answer.strip() for answer in answers) if answers else 1
    return bound, len(sample.images), empty, digest(sample.ignored)


def facts_of_all(source: Any, name: str) -> np.ndarray:
    """[n, COLUMNS] int32: facts of every record of a source, by `source.look(number)`; stored in `source.index`.

    Raises the first DataError in the order of the file.
    """

    def build() -> np.ndarray:
        return count_all(f"checking {name}", len(source), source.look, columns=COLUMNS).reshape(-1)

    return source.index.array("facts", np.int32, build).reshape(-1, COLUMNS)


def longest_text(sample: Sample) -> str:
    """Which turn of a sample is the longest, for messages."""
    number, turn = max(enumerate(sample.turns), key=lambda numbered: len(numbered[1].text))
    return f"The longest text is that of turn {number}, {len(turn.text)} characters."


def unanswered(sample: Sample) -> str | None:
    """Which turn of a sample has no answer, for messages; None where every question has one."""
    for index, turn in enumerate(sample.turns):
        if turn.role == "gpt" and not turn.text.strip():
            return f"{sample.where}: the answer in turn {index} is empty; expected a text, such as {ANSWER}."
    if any(turn.role == "gpt" for turn in sample.turns):
        return None
    return f"{sample.where}: there is no answer; expected one behind the question, such as {ANSWER}."
