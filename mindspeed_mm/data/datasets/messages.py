"""Hugging Face "messages": {"messages": [{"role", "content"}, ...], "images": [...]} as JSON, JSONL or parquet.

`content` is a text or a list of parts {"type": "text", "text": ..} and {"type": "image"}. An image part may name its
image (key image, path or url) or its place in "images" (key index), else those are taken in order. In a text,
`<image>` stands for an image only when no content is a list and the record has "images"; everywhere else it is text.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from mindspeed_mm.constants import IMAGE_TOKEN
from mindspeed_mm.data.conversation import alternating, checked_text, literal_turn, refuse_web_address
from mindspeed_mm.data.datasets._files import FileRecords, Parsed, ReadOptions
from mindspeed_mm.data.keys import (
    IMAGE_FILE,
    IMAGE_PART,
    IMAGE_URL,
    MESSAGE,
    TEXT_PART,
    Keys,
    is_learned,
    keys,
    unused_of_turns,
)
from mindspeed_mm.data.sample import ImageBytes, Turn
from mindspeed_mm.errors import DataError, TemplateError

ROLES = {"user": "human", "assistant": "gpt", "system": "system"}
RECORD = keys("a record", "id", "image", "images", "messages")
EXAMPLE = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'

NAMES = ("image", "path", "url", "image_url")
"""Keys by which an image part names its image."""

PLAIN = frozenset(("role", "content"))

Image = str | ImageBytes
Named = Image | int | None
"""What an image part says of its image: the image itself, its place in "images", or nothing."""


def parse(record: dict[str, Any], options: ReadOptions) -> Parsed:
    """Turns and images of a record. Raises DataError for a broken one."""
    listed = listed_images(record)
    turns, named = parse_messages(record.get("messages"), "messages", bool(listed))
    ignored = RECORD.unused(record, "", options.unknown_keys)
    ignored += unused_of_files(record, options.unknown_keys)
    ignored += unused_of_messages(record["messages"], "messages", options.unknown_keys)
    return Parsed(turns, merged_images(listed, named), ignored=tuple(ignored))


def unused_of_messages(entries: list[Any], key: str, policy: str) -> list[str]:
    """Keys of messages and of their parts that nothing reads. Raises UnknownKeyError as Keys.unused does."""
    ignored: list[str] = []
    for index, entry in enumerate(entries):
        if not entry.keys() <= PLAIN or isinstance(entry["content"], list):
            ignored += unused_of_message(entry, MESSAGE, f"{key}[{index}]", f"{key}[]", policy)
    return ignored


def unused_of_message(entry: Mapping[str, Any], allowed: Keys, place: str, name: str, policy: str) -> list[str]:
    """As above of one message, which stands at `place` and is told as `name`."""
    ignored = [f"{name}.{key}" for key in allowed.unused(entry, place, policy)]
    text = next((key for key in ("content", "value") if key in entry), "content")
    for number, part in enumerate(entry[text] if isinstance(entry.get(text), list) else ()):
        ignored += [f"{name}.{text}[].{key}" for key in _unused_of_part(part, f"{place}.{text}[{number}]", policy)]
    return ignored


def unused_of_files(record: Mapping[str, Any], policy: str) -> list[str]:
    """As above, of the images that a record lists as objects."""
    key = "images" if record.get("images") is not None else "image"
    listed = record.get(key)
    entries = listed if isinstance(listed, list) else [listed]
    return unused_of_turns(entries, IMAGE_FILE, key, policy)


def _unused_of_part(part: Mapping[str, Any], place: str, policy: str) -> list[str]:
    if part["type"] == "text":
        return TEXT_PART.unused(part, place, policy)
    ignored = IMAGE_PART.unused(part, place, policy)
    for name, value in part.items():
        if name in NAMES and isinstance(value, Mapping):
            allowed = IMAGE_URL if "url" in value else IMAGE_FILE
            ignored += [f"{name}.{inner}" for inner in allowed.unused(value, f"{place}.{name}", policy)]
    return ignored


def parse_messages(entries: Any, key: str, has_images: bool) -> tuple[tuple[Turn, ...], list[Named]]:
    """Turns of a list of messages, and what its image parts say of their images, in order."""
    if not isinstance(entries, list) or not entries:
        raise DataError(f'"{key}" is {entries!r:.80}; expected a list of messages, such as {EXAMPLE}.')
    # Who writes images as parts has no need of placeholders in texts.
    in_parts = any(isinstance(entry, Mapping) and isinstance(entry.get("content"), list) for entry in entries)
    placeholders = has_images and not in_parts
    turns: list[Turn] = []
    named: list[Named] = []
    for index, entry in enumerate(entries):
        place = f"{key}[{index}]"
        if not isinstance(entry, Mapping) or "role" not in entry or "content" not in entry:
            raise DataError(f'{place} is {entry!r:.80}; expected an object with "role" and "content", as in {EXAMPLE}.')
        role = ROLES.get(entry["role"]) if isinstance(entry["role"], str) else None
        if role is None or (role == "system" and index):
            raise TemplateError(
                f'{place}.role is {entry["role"]!r:.80}; expected "user" or "assistant", or "system" in the first.'
            )
        learned = len(entry) == 2 or is_learned(entry, role, place)
        content = entry["content"]
        if isinstance(content, list):
            turn, images = _from_parts(role, content, place)
            turns.append(turn if learned else replace(turn, learned=False))
            named += images
            continue
        text = checked_text(content, f"{place}.content")
        turns.append(Turn(role, text, learned=learned) if placeholders else literal_turn(role, text, learned))
        named += [None] * (text.count(IMAGE_TOKEN) if placeholders else 0)
    return alternating(turns, key), named


def _from_parts(role: Any, parts: list[Any], place: str) -> tuple[Turn, list[Named]]:
    """A turn of parts; an image is followed by a line feed, as in LLaVA's own data."""
    text, literal, images = "", [], []
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            piece = literal_turn(role, checked_text(part.get("text"), f"{place}.content[{index}].text"))
            literal += [len(text) + start for start in piece.literal]
            text += piece.text
        elif kind in ("image", "image_url"):
            images.append(_image(part, f"{place}.content[{index}]"))
            text += IMAGE_TOKEN + "\n"
        else:
            raise DataError(
                f'{place}.content[{index}] is {part!r:.80}; expected {{"type": "text", "text": ..}} or '
                '{"type": "image"}.'
            )
    if parts and kind != "text":
        text = text.removesuffix("\n")
    return Turn(role, text, tuple(literal)), images


def _image(part: Mapping[str, Any], place: str) -> Named:
    given = [key for key in (*NAMES, "index") if part.get(key) is not None]
    if len(given) > 1:
        raise DataError(f'{place} has "{given[0]}" and "{given[1]}"; expected one of them to say which image it is.')
    value = part[given[0]] if given and given[0] != "index" else None
    if isinstance(value, Mapping) and "url" in value:
        value = value["url"]
    if value is not None:
        return image_source(value, place)
    position = part.get("index")
    if position is not None and type(position) is not int:
        raise DataError(f'{place}.index is {position!r:.80}; expected a place in "images", such as 0.')
    return position


def image_source(value: Any, place: str) -> Image:
    """An image's name, or its bytes in the form of Hugging Face's Image feature {"bytes", "path"}."""
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return ImageBytes(f"{place} ({value.get('path') or 'unnamed'})", value["bytes"])
    if isinstance(value, Mapping) and value.get("bytes") is None:
        value = value.get("path")
    if not isinstance(value, str) or not value:
        raise DataError(f'{place} is {value!r:.80}; expected the name of an image, such as "coco/1.jpg".')
    refuse_web_address(value, place)
    return value.removeprefix("file://")


def listed_images(record: Mapping[str, Any]) -> list[Image]:
    """The images under "images" or "image". Raises DataError."""
    if record.get("image") is not None and record.get("images") is not None:
        raise DataError('has both "image" and "images"; keep one of them.')
    key = "images" if record.get("images") is not None else "image"
    value = record.get(key)
    values = [] if value is None else value if isinstance(value, list) else [value]
    return [image_source(item, f"{key}[{index}]") for index, item in enumerate(values)]


def merged_images(listed: list[Image], named: list[Named]) -> list[Image]:
    """Images in reading order: those named in place, the others from the list. Raises DataError."""
    places = [place for place in named if place is None or isinstance(place, int)]
    if len(places) != len(listed):
        raise DataError(
            f'the messages hold {len(places)} image parts or <image> placeholders without a name, but "images" lists '
            f"{len(listed)}; expected one each. Correct the record."
        )
    order = [position if place is None else place for position, place in enumerate(places)]
    if sorted(order) != list(range(len(listed))):
        raise DataError(
            f'the "index" of the image parts is {order} in turn; expected each of 0 to {len(listed) - 1} once, such as '
            '{"type": "image", "index": 0}, the places in "images".'
        )
    rest = iter(order)
    return [listed[next(rest)] if place is None or isinstance(place, int) else place for place in named]


DATASET = partial(FileRecords, parse=parse)
