"""One item of grounding data: images, boxes and points in pixels, and turns whose placeholders name them.

{"image": "a.jpg", "target": {"boxes": [[24, 63, 76, 113]], "points": [[50, 88]]}, "conversations": [
{"from": "human", "value": "<image>\\nWhat is at <points>?", "points_seq": [[0]]},
{"from": "gpt", "value": "A house<boxes>.", "boxes_seq": [[0]]}]}

Each `<boxes>` takes one entry of boxes_seq, a list of numbers of boxes: one placeholder may stand for several. With a
list of images, "target" is a list of as many, and a box is a pair, [number of the image, number of its box]. There, a
turn's "image_seq" may say which image each of its `<image>` shows; else they show the list from its start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mindspeed_mm.constants import IMAGE_TOKEN
from mindspeed_mm.data.conversation import checked_text, record_images, shown
from mindspeed_mm.data.keys import MARKS, is_learned, keys, unused_of_turns
from mindspeed_mm.errors import DataError

BOXES, POINTS = "<boxes>", "<points>"
EXPRESSION, OBJECTS, QUESTION = "<expr>", "<objs>", "<question>"
PHRASE_START, PHRASE_END = "<ph_st>", "<ph_ed>"
TEMPLATE_PLACEHOLDERS = (EXPRESSION, OBJECTS, QUESTION)
"""Of question templates: a reader fills them in, an item has none."""

SEQUENCES = {BOXES: "boxes_seq", POINTS: "points_seq"}
RECORD = keys("a record", "id", "image", "images", "target", "conversations")
TARGET = keys("a target", "boxes", "points", "width", "height")
TURN = keys("a turn", "from", "value", *SEQUENCES.values(), "image_seq", *MARKS)
ROLES = ("human", "gpt")
TURNS = '[{"from": "human", "value": "<image>\\nWhere?"}, {"from": "gpt", "value": "<boxes>", "boxes_seq": [[0]]}]'

Place = tuple[int, int]
"""Number of an image, and of a box or point of it."""


@dataclass(frozen=True)
class BoxTarget:
    """Boxes and points of one image."""

    boxes: tuple[tuple[float, ...], ...] = ()
    """(left, top, right, bottom) in pixels; fractions of the image where the data set is said to be normalised."""

    points: tuple[tuple[float, ...], ...] = ()
    """(x, y), as boxes."""

    size: tuple[int, int] | None = None
    """(width, height) of the image where the record gives them."""


@dataclass(frozen=True)
class GroundedTurn:
    """A turn before its boxes are written."""

    role: str
    text: str
    boxes: tuple[tuple[Place, ...], ...] = ()
    """For each <boxes> of the text."""

    points: tuple[tuple[Place, ...], ...] = ()
    """For each <points>."""

    learned: bool = True


@dataclass(frozen=True)
class Item:
    """A checked record."""

    images: tuple[str, ...]
    targets: tuple[BoxTarget, ...]
    """One for each image."""

    shown: tuple[str, ...]
    """Images in the order in which the turns show them."""

    turns: tuple[GroundedTurn, ...]
    ignored: tuple[str, ...] = ()
    """Keys that nothing reads."""


def read_item(record: Mapping[str, Any], *, normalised: bool = False, unknown_keys: str = "error") -> Item:
    """The item of a record; `normalised` says that its boxes are fractions of the image.

    Raises DataError naming the field; the caller adds file and line.
    """
    if not isinstance(record, Mapping):
        raise DataError(f'is {shown(record)}; expected an object such as {{"image": "a.jpg", "target": {{..}}, ..}}.')
    images = record_images(record)
    is_list = isinstance(record.get("image", record.get("images")), list)
    ignored = RECORD.unused(record, "", unknown_keys)
    targets = _targets(record.get("target"), len(images), is_list, normalised)
    for place, target in _places_of_targets(record.get("target")):
        ignored += [f"{place}.{name}" for name in TARGET.unused(target, place, unknown_keys)]
    entries = record.get("conversations")
    if not isinstance(entries, list) or not entries:
        raise DataError(f'"conversations" is {shown(entries)}; expected a list of turns, such as {TURNS}.')
    turns = tuple(_turn(entry, f"conversations[{index}]", targets, is_list) for index, entry in enumerate(entries))
    if turns[0].role != "human":
        raise DataError(f'conversations[0].from is "{turns[0].role}"; expected "human", which asks first: {TURNS}.')
    ignored += unused_of_turns(entries, TURN, "conversations", unknown_keys)
    return Item(tuple(images), targets, _shown(entries, images, is_list), turns, tuple(ignored))


def _shown(entries: list[Any], images: Sequence[str], is_list: bool) -> tuple[str, ...]:
    """The images as the turns name them; as they are listed where no turn does."""
    if all(entry.get("image_seq") is None for entry in entries):
        return tuple(images)
    numbers: list[int] = []
    for index, entry in enumerate(entries):
        place, wanted = f"conversations[{index}].image_seq", entry["value"].count(IMAGE_TOKEN)
        given = entry.get("image_seq")
        if not is_list:
            raise DataError(f'{place} is given, and "image" is no list, which has one order; remove it.')
        given = [] if given is None else given
        if not isinstance(given, list) or any(type(number) is not int for number in given) or len(given) != wanted:
            raise DataError(
                f"{place} is {shown(given)}, and the text holds {wanted} {IMAGE_TOKEN}; expected the number of an "
                "image for each, in every turn that holds one."
            )
        numbers += given
    if set(numbers) != set(range(len(images))):
        raise DataError(
            f"image_seq of all turns names the images {sorted(set(numbers))}, and there are {len(images)}, counted "
            "from 0; expected each of them at least once. Correct it, or the list."
        )
    return tuple(images[number] for number in numbers)


def _places_of_targets(value: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """The objects of a checked target with their places."""
    if isinstance(value, list):
        return [(f"target[{index}]", entry) for index, entry in enumerate(value)]
    return [] if value is None else [("target", value)]


def _targets(value: Any, count: int, is_list: bool, normalised: bool) -> tuple[BoxTarget, ...]:
    if value is None:
        return (BoxTarget(),) * count
    if isinstance(value, list) != is_list or (is_list and len(value) != count) or not count:
        raise DataError(
            f'"target" is {shown(value)} and the record has {count} images; expected an object with "boxes" and '
            '"points" for one image, and a list of as many objects for a list of images. Correct the record.'
        )
    given = value if is_list else [value]
    places = [f"target[{index}]" for index in range(count)] if is_list else ["target"]
    return tuple(_target(*pair, normalised) for pair in zip(given, places, strict=True))


def _target(value: Any, place: str, normalised: bool) -> BoxTarget:
    if not isinstance(value, Mapping):
        raise DataError(f'{place} is {shown(value)}; expected an object such as {{"boxes": [[24, 63, 76, 113]]}}.')
    size = _size(value, place)
    lists = {}
    for key, length in (("boxes", 4), ("points", 2)):
        entries = value.get(key) or []
        if not isinstance(entries, list):
            raise DataError(f"{place}.{key} is {shown(entries)}; expected a list of lists of {length} numbers.")
        lists[key] = tuple(
            numbers(entry, length, f"{place}.{key}[{index}]", normalised) for index, entry in enumerate(entries)
        )
    target = BoxTarget(lists["boxes"], lists["points"], size)
    if size is not None:
        check_inside(target, size, place, normalised)
    return target


def _size(value: Mapping[str, Any], place: str) -> tuple[int, int] | None:
    found = (value.get("width"), value.get("height"))
    if found == (None, None):
        return None
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in found):
        raise DataError(
            f"{place} has width {shown(found[0])} and height {shown(found[1])}; expected both, in pixels, or none."
        )
    return int(found[0] or 0), int(found[1] or 0)


def numbers(entry: Any, length: int, place: str, normalised: bool) -> tuple[float, ...]:
    """A box (length 4) or point (2) of a record. Raises DataError for what is none, and for the wrong unit."""
    is_number = isinstance(entry, Sequence) and all(
        isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in entry
    )
    if not is_number or isinstance(entry, str) or len(entry) != length:
        names = "left, top, right and bottom" if length == 4 else "x and y"
        raise DataError(f"{place} is {shown(entry)}; expected {length} finite numbers, {names}.")
    if length == 4 and (entry[2] < entry[0] or entry[3] < entry[1]):
        raise DataError(
            f"{place} is {shown(entry)}, whose right or bottom lies before its left or top; expected left, top, right, "
            "bottom. A box of left, top, width and height is converted before."
        )
    if min(entry) < 0 or (normalised and max(entry) > 1):
        unit = "fractions of the image, 0 to 1" if normalised else "pixels inside of the image, 0 or more"
        raise DataError(f"{place} is {shown(entry)}; expected {unit}. Correct the record, or the flag normalised.")
    if not normalised and max(entry) <= 1 and any(n != int(n) for n in entry):
        raise DataError(
            f"{place} is {shown(entry)}, which looks like fractions of the image; expected pixels. Set "
            '"normalised": true for this data set, or correct the record.'
        )
    return tuple(float(n) for n in entry)


def check_inside(target: BoxTarget, size: tuple[int, int], place: str, normalised: bool = False) -> None:
    """Raise DataError for a box or point outside of an image of `size` (width, height)."""
    width, height = (1, 1) if normalised else size
    for key, entries in (("boxes", target.boxes), ("points", target.points)):
        for index, entry in enumerate(entries):
            if max(entry[0::2]) > width or max(entry[1::2]) > height:
                raise DataError(
                    f"{place}.{key}[{index}] is {list(entry)}, outside of the image of {size[0]} x {size[1]} pixels; "
                    "expected pixels of the image as it is stored. Correct the record, or the image."
                )


def _turn(entry: Any, place: str, targets: tuple[BoxTarget, ...], is_list: bool) -> GroundedTurn:
    if not isinstance(entry, Mapping) or entry.get("from") not in ROLES:
        raise DataError(f'{place} is {shown(entry)}; expected an object from "human" or "gpt", as in {TURNS}.')
    role, text = entry["from"], checked_text(entry.get("value"), f"{place}.value")
    if role == "gpt" and IMAGE_TOKEN in text:
        raise DataError(f"{place}.value is an answer with {IMAGE_TOKEN}; expected images in human turns only.")
    for name in (*TEMPLATE_PLACEHOLDERS, PHRASE_START, PHRASE_END):
        if name in text:
            raise DataError(
                f"{place}.value holds {name}, which a reader of the data set fills in; expected it filled. Correct the "
                "text, or the dataset_type."
            )
    counts = {
        BOXES: [len(target.boxes) for target in targets],
        POINTS: [len(target.points) for target in targets],
    }
    found = {
        name: _sequence(entry.get(key), text.count(name), f"{place}.{key}", name, counts[name], is_list)
        for name, key in SEQUENCES.items()
    }
    return GroundedTurn(role, text, found[BOXES], found[POINTS], is_learned(entry, role, place))


def _sequence(
    value: Any, wanted: int, place: str, name: str, counts: list[int], is_list: bool
) -> tuple[tuple[Place, ...], ...]:
    """The places of each placeholder of a turn, checked."""
    if value is None and wanted:
        raise DataError(f"{place} is missing, and the text holds {wanted} {name}; expected a list of as many lists.")
    groups = [] if value is None else value
    if not isinstance(groups, list) or not all(isinstance(group, list) and group for group in groups):
        raise DataError(f"{place} is {shown(value)}; expected a list with a list of numbers for each {name}.")
    if len(groups) != wanted:
        raise DataError(
            f"{place} has {len(groups)} entries, and the text holds {wanted} {name}; expected as many. Correct either."
        )
    return tuple(
        tuple(_place(atom, f"{place}[{index}]", name, counts, is_list) for atom in group)
        for index, group in enumerate(groups)
    )


def _place(atom: Any, place: str, name: str, counts: list[int], is_list: bool) -> Place:
    pair = atom if is_list else [0, atom]
    if not isinstance(pair, list) or len(pair) != 2 or any(type(number) is not int for number in pair):
        form = "[number of the image, number of its box or point]" if is_list else "a number"
        raise DataError(f"{place} holds {shown(atom)}; expected {form}.")
    image, number = pair
    if not 0 <= image < len(counts) or not 0 <= number < counts[image]:
        there = f"{counts[image]} {name[1:-1]}" if 0 <= image < len(counts) else f"{len(counts)} images"
        raise DataError(
            f"{place} names {shown(atom)}, and there are {there}, counted from 0; correct it, or the target."
        )
    return image, number
