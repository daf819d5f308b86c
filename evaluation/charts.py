"""What the pages draw: bars with intervals, and the templates."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

_FOLDER = Path(__file__).parent
UNNAMED_LINES = ("none", "all", "points")
"""Names of the one line of a table without splits; they say nothing to a reader."""
ROUNDING = 1e-9
"""Share by which a sum of rates may exceed its scale."""


@dataclass(frozen=True)
class Bar:
    """A bar: its length and the ends of its interval in per cent of the track (None: no interval), and its text."""

    width: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class ScoreLine:
    """One split of a table of scores."""

    title: str
    """Heading; empty where the table has a single line without a name of its own."""
    bars: list[tuple[str, Bar]]
    counts: list[tuple[str, str]]
    """Numbers that are no rates."""


@functools.cache
def template(name: str) -> jinja2.Template:
    """A template of this package; texts are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(name)


def make_bar(value: float, ends: Sequence[float | None] | None, top: float) -> Bar:
    """A bar of `value` on a track from 0 to `top`."""
    text = number_text(value, top)
    if ends is None or None in ends:
        return Bar(_per_cent(value, top), None, None, text)
    low, high = ends
    return Bar(
        _per_cent(value, top),
        _per_cent(low, top),
        _per_cent(high, top),
        f"{text} ({number_text(low, top)} to {number_text(high, top)})",
    )


def number_text(value: float, top: float) -> str:
    """A rate with four places behind the point, per cents with two, points with one."""
    return f"{value:.{4 if top <= 1 else 2 if top <= 100 else 1}f}"


def _per_cent(value: float, top: float) -> float:
    return min(100.0, max(0.0, 100 * value / top))


def track_top(scale: float, values: Iterable[float]) -> float:
    """Upper end of a track: the scale of rates, or the largest value where points or CIDEr go beyond it."""
    return max([scale, *(value for value in values if value > scale * (1 + ROUNDING))])


def table_lines(score: Mapping[str, Any]) -> list[ScoreLine]:
    """The lines of one mode's scores in a report.json. Reports of earlier versions have no intervals in the table:
    there all of it that lies between 0 and the scale is drawn."""
    intervals = score.get("table_intervals_95")
    lines = []
    for name, columns in score["table"].items():
        values = {column: value for column, value in columns.items() if value is not None}
        ends = intervals.get(name, {}) if intervals is not None else dict.fromkeys(values)
        drawn = [column for column in values if column in ends]
        highest = [end for column in drawn for end in ends[column] or ()]
        top = track_top(score["table_scale"], [values[column] for column in drawn] + highest)
        lines.append(
            ScoreLine(
                "" if len(score["table"]) == 1 and name in UNNAMED_LINES else "no split" if name == "none" else name,
                [(column, make_bar(values[column], ends[column], top)) for column in drawn],
                [(column, f"{value:.4g}") for column, value in values.items() if column not in ends],
            )
        )
    return lines
