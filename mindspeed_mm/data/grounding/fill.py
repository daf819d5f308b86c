"""An item as turns of text: each `<boxes>` and `<points>` becomes what a notation writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from mindspeed_mm.data.grounding.geometry import PRECISION, BoxStep, Size, final_size, fractions, moved
from mindspeed_mm.data.grounding.item import BOXES, POINTS, BoxTarget, GroundedTurn, Item, Place, check_inside
from mindspeed_mm.data.grounding.notation import Notation
from mindspeed_mm.data.sample import Turn

PLACEHOLDER = re.compile(f"({re.escape(BOXES)}|{re.escape(POINTS)})")


def written_turns(
    item: Item,
    style: Notation,
    size_of: Callable[[int], Size],
    steps: Sequence[BoxStep] = (),
    *,
    normalised: bool = False,
) -> tuple[Turn, ...]:
    """Turns with their boxes and points as text, as fractions of the image after `steps`.

    `size_of` gives the (width, height) of an image by its number; it is asked only for images whose boxes are used and
    whose record does not say its size. Raises DataError for a box outside of its image.
    """
    known: dict[int, tuple[BoxTarget, Size]] = {}

    def target_of(number: int) -> tuple[BoxTarget, Size]:
        if number not in known:
            target = item.targets[number]
            size = target.size or size_of(number)
            place = f"target[{number}]" if len(item.targets) > 1 else "target"
            check_inside(target, size, place, normalised)
            known[number] = (target, size)
        return known[number]

    def entry(place: Place, kind: str) -> list[float]:
        target, size = target_of(place[0])
        found = (target.boxes if kind == BOXES else target.points)[place[1]]
        if normalised:
            found = tuple(value * side for value, side in zip(found, size * (len(found) // 2), strict=True))
        decimals = getattr(style, "decimals", PRECISION)
        return fractions(moved(found, size, steps), *final_size(size, steps), decimals)

    return tuple(_written(turn, style, entry) for turn in item.turns)


def _written(turn: GroundedTurn, style: Notation, entry: Callable[[Place, str], list[float]]) -> Turn:
    groups = {BOXES: iter(turn.boxes), POINTS: iter(turn.points)}
    # The text is cut at its placeholders, so braces and whatever else it holds stay as they are.
    pieces = [
        style.format([entry(place, piece) for place in next(groups[piece])]) if piece in groups else piece
        for piece in PLACEHOLDER.split(turn.text)
    ]
    return Turn("human" if turn.role == "human" else "gpt", "".join(pieces), learned=turn.learned)
