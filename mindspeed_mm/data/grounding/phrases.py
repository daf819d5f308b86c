"""Texts with marked phrases, as Shikra's Flickr30k and GQA files have them: "<ph_st>A man<ph_ed> waits."."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mindspeed_mm.data.conversation import shown
from mindspeed_mm.data.grounding.item import BOXES, PHRASE_END, PHRASE_START
from mindspeed_mm.errors import DataError

PHRASE = re.compile(f"{PHRASE_START}(.*?){PHRASE_END}", re.DOTALL)


@dataclass(frozen=True)
class MarkedText:
    """A text, and the boxes of each of its phrases."""

    text: str
    boxes: tuple[tuple[int, ...], ...]

    @classmethod
    def read(cls, text: str, sequence: Any, place: str, count: int) -> MarkedText:
        """Of a record's text and its boxes_seq, whose numbers count `count` boxes.

        Raises DataError for marks that do not pair up, another number of entries than of phrases, and a number that
        names no box.
        """
        phrases = PHRASE.findall(text)
        marks = text.count(PHRASE_START), text.count(PHRASE_END)
        if marks != (len(phrases),) * 2 or any(mark in phrase for phrase in phrases for mark in (PHRASE_START, BOXES)):
            raise DataError(
                f"{place} holds {marks[0]} {PHRASE_START} and {marks[1]} {PHRASE_END}, which are not pairs around "
                f"words; expected such as {PHRASE_START}A man{PHRASE_END} waits. Correct the text."
            )
        groups = sequence if isinstance(sequence, list) else None
        if groups is None or len(groups) != len(phrases) or not all(isinstance(group, list) for group in groups):
            raise DataError(
                f"the boxes of {place} are {shown(sequence)}, and it marks {len(phrases)} phrases; expected a list "
                "with a list of numbers for each. Correct either."
            )
        for number in (number for group in groups for number in group):
            if type(number) is not int or not 0 <= number < count:
                raise DataError(
                    f"the boxes of {place} name {shown(number)}, and there are {count} boxes, counted from 0; correct "
                    "it, or the boxes."
                )
        return cls(text, tuple(tuple(group) for group in groups))

    def written(self, keep: Callable[[int], Sequence[int]]) -> tuple[str, list[list[int]]]:
        """(the text with a placeholder behind each phrase that keeps boxes, its boxes_seq).

        `keep` gives the boxes of a phrase by its number; none for a phrase that stays words.
        """
        found: list[list[int]] = []
        numbers = iter(range(len(self.boxes)))

        def replaced(match: re.Match[str]) -> str:
            kept = list(keep(next(numbers)))
            if kept:
                found.append(kept)
            return match[1] + (BOXES if kept else "")

        return PHRASE.sub(replaced, self.text), found
