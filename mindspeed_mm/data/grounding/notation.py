"""Boxes and points as text, and back: one notation for each way that models write them.

A notation writes fractions of the image (0..1). `parse` gives back what `format` wrote, to half a step of the notation
(to one step where it cuts off), and nothing that `format` could not have written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mindspeed_mm.data.grounding.geometry import PRECISION
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.registry import nearest

Entry = Sequence[float]
"""A box (left, top, right, bottom) or a point (x, y), 0..1 of the image."""

Groups = list[list[list[float]]]
"""Groups in the order of the text, each a list of boxes or points."""

Brackets = Literal["square", "round"]
BINS = 1001
MARKS = {"square": ("[", "]"), "round": ("(", ")")}
_NUMBER = r"\d(?:\.\d*)?"


class Notation(Protocol):
    """How boxes and points are written."""

    def format(self, entries: Sequence[Entry]) -> str:
        """Text of the boxes, or of the points, of one placeholder."""
        ...

    def parse(self, text: str, size: int = 4) -> Groups:
        """All groups of boxes (size 4) or points (size 2) in a text."""
        ...


@dataclass(frozen=True)
class BracketNotation:
    """Shikra's: [0.123,0.456,0.789,1.000;..], fixed decimals and no spaces. One digit stands before the point."""

    brackets: Brackets = "square"
    precision: int = PRECISION

    def __post_init__(self) -> None:
        if self.brackets not in MARKS:
            raise ConfigError(f'found the brackets "{self.brackets}"; {nearest(self.brackets, list(MARKS))}')
        if self.precision < 0:
            raise ConfigError(f"found a precision of {self.precision}; expected the number of decimals, 0 or more")

    @property
    def decimals(self) -> int:
        """Of the fractions that it takes: Shikra rounds to 3 before it writes; more are kept where asked for."""
        return max(PRECISION, self.precision)

    def format(self, entries: Sequence[Entry]) -> str:
        """As Notation."""
        opening, closing = MARKS[self.brackets]
        return opening + ";".join(",".join(f"{n:.{self.precision}f}" for n in entry) for entry in entries) + closing

    def parse(self, text: str, size: int = 4) -> Groups:
        """As Notation; any number of decimals is read."""
        opening, closing = map(re.escape, MARKS[self.brackets])
        item = f"{_NUMBER}(?:,{_NUMBER}){{{size - 1}}}"
        found = re.findall(f"{opening}({item}(?:;{item})*){closing}", text)
        return [[[float(n) for n in entry.split(",")] for entry in group.split(";")] for group in found]


@dataclass(frozen=True)
class BinNotation:
    """Shikra's words: <b_st><bin_12> <bin_5> <bin_40> <bin_9><b_ed>, with <p_st> and <p_ed> around points."""

    bins: int = BINS

    @property
    def words(self) -> tuple[str, ...]:
        """All words of the notation, in the order in which they are added to a vocabulary; 1,007 by default."""
        marks = tuple(f"<{kind}_{part}>" for kind in "bp" for part in ("st", "sep", "ed"))
        return marks + tuple(f"<bin_{number}>" for number in range(self.bins))

    def format(self, entries: Sequence[Entry]) -> str:
        """As Notation."""
        kind = "p" if entries and len(entries[0]) == 2 else "b"
        items = (" ".join(f"<bin_{round(n * (self.bins - 1))}>" for n in entry) for entry in entries)
        return f"<{kind}_st>{f'<{kind}_sep>'.join(items)}<{kind}_ed>"

    def parse(self, text: str, size: int = 4) -> Groups:
        """As Notation; spaces between the words do not matter, and words beyond the bins are not read."""
        kind = "p" if size == 2 else "b"
        item = rf"(?:<bin_\d+>){{{size}}}"
        found = re.findall(f"<{kind}_st>({item}(?:<{kind}_sep>{item})*)<{kind}_ed>", text.replace(" ", ""))
        groups = [
            [[int(n) for n in re.findall(r"<bin_(\d+)>", entry)] for entry in group.split(f"<{kind}_sep>")]
            for group in found
        ]
        known = [group for group in groups if all(n < self.bins for entry in group for n in entry)]
        return [[[n / (self.bins - 1) for n in entry] for entry in group] for group in known]


@dataclass(frozen=True)
class WholeNumberNotation:
    """Whole numbers of 0..`steps` between fixed marks, as many models have learned them."""

    opening: str
    between: str
    closing: str
    steps: int
    middle: str | None = None
    """Between the corners of a box, where it differs from `between`."""

    joint: str = ""
    """Between two boxes of one placeholder; those that stand so are read as one group."""

    outer: tuple[str, str] = ("", "")
    """Around all boxes of one placeholder."""

    truncates: bool = False
    """Whole numbers are cut off instead of rounded."""

    @property
    def decimals(self) -> int | None:
        """Of the fractions that it takes; None: all that they have."""
        return None if self.truncates else PRECISION

    def format(self, entries: Sequence[Entry]) -> str:
        """As Notation."""
        # What one notation wrote and another calculation rounded stays on its step.
        whole = (lambda n: int(n * self.steps + 1e-9)) if self.truncates else (lambda n: round(n * self.steps))
        body = self.joint.join(self._one([whole(n) for n in entry]) for entry in entries)
        return self.outer[0] + body + self.outer[1]

    def _one(self, values: Sequence[int]) -> str:
        between = [self.between] * (len(values) - 1)
        if self.middle is not None and len(values) == 4:
            between[1] = self.middle
        return self.opening + "".join(f"{n}{mark}" for n, mark in zip(values, [*between, self.closing], strict=True))

    def parse(self, text: str, size: int = 4) -> Groups:
        """As Notation; numbers above `steps` are not read."""
        marks = [self.between] * (size - 1)
        if self.middle is not None and size == 4:
            marks[1] = self.middle
        number = r"(?:0|[1-9]\d*)"
        one = re.escape(self.opening) + "".join(number + re.escape(mark) for mark in [*marks, self.closing])
        many = f"{one}(?:{re.escape(self.joint)}{one})*"
        found = re.findall(f"{re.escape(self.outer[0])}({many}){re.escape(self.outer[1])}", text)
        groups = []
        for group in found:
            values = [int(n) for n in re.findall(r"\d+", group)]
            entries = [values[start : start + size] for start in range(0, len(values), size)]
            if max(values) <= self.steps:
                groups.append([[n / self.steps for n in entry] for entry in entries])
        return groups


NOTATIONS: dict[str, Notation] = {
    "square": BracketNotation("square"),
    "round": BracketNotation("round"),
    "bins": BinNotation(),
    "minigpt_v2": WholeNumberNotation("{<", "><", ">}", 100, joint="<delim>", truncates=True),
    "qwen2_vl": WholeNumberNotation("<|box_start|>(", ",", ")<|box_end|>", 1000, middle="),("),
    "internvl": WholeNumberNotation("[", ", ", "]", 1000, joint=", ", outer=("<box>[", "]</box>")),
}
"""By name. Qwen2-VL's numbers are thousandths, so are InternVL's; MiniGPT-v2's are hundredths."""


def notation(name: str, precision: int | None = None) -> Notation:
    """A notation by name; `precision` is for brackets alone. Raises ConfigError for what is not known."""
    if name not in NOTATIONS:
        raise ConfigError(f'unknown notation of boxes "{name}"; {nearest(name, list(NOTATIONS))}')
    found = NOTATIONS[name]
    if precision is None:
        return found
    if not isinstance(found, BracketNotation):
        raise ConfigError(f'precision is of brackets ("square" or "round"); found it with "{name}", remove it')
    return BracketNotation(found.brackets, precision)


def parse_lenient(text: str, style: Notation, size: int = 4) -> tuple[Groups, bool]:
    """As `style.parse`; where that finds nothing, spaces are put right, ".5" is read as "0.5", and it is tried again.

    Returns the groups, and whether that was needed, which reports say. A number below 0 reads as 0.
    """
    strict = style.parse(text, size)
    if strict:
        return strict, False
    cleaned = re.sub(r"-\s*\d+(?:\.\d*)?", "0", text)
    cleaned = re.sub(r"(?<=[\[(,;])\s+|\s+(?=[\]),;])", "", cleaned)
    if isinstance(style, WholeNumberNotation) and " " in style.between:
        cleaned = re.sub(r",(?=[\d\[])", ", ", cleaned)
    cleaned = re.sub(r"(?<=[\[(,;])\.(?=\d)", "0.", cleaned)
    found = style.parse(cleaned, size)
    return found, bool(found)
