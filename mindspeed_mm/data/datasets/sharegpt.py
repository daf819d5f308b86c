"""ShareGPT: {"conversations": [{"from", "value"}, ...]} with the role names of its many collections.

"system" (a turn, or a key of the record) may come first. Where the record names "image" or "images", each `<image>`
in a text stands for one; where it does not, `<image>` is text.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mindspeed_mm.data.conversation import alternating, checked_text, literal_turn, record_images
from mindspeed_mm.data.datasets._files import FileRecords, Parsed, ReadOptions
from mindspeed_mm.data.keys import LLAVA_TURN, is_learned, keys, unused_of_turns
from mindspeed_mm.data.sample import Turn
from mindspeed_mm.errors import DataError, TemplateError

ROLES = {
    **dict.fromkeys(("human", "user"), "human"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bing", "bard"), "gpt"),
    "system": "system",
}
RECORD = keys("a record", "id", "system", "image", "images", "conversations")
EXAMPLE = '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}'


def parse(record: dict[str, Any], options: ReadOptions) -> Parsed:
    """Turns and image names of a record. Raises DataError for a broken one."""
    images = record_images(record)
    entries = record.get("conversations")
    if not isinstance(entries, list) or not entries:
        raise DataError(f'"conversations" is {entries!r:.80}; expected a list of turns, such as {EXAMPLE}.')
    turns = [parse_turn(entry, f"conversations[{index}]", bool(images)) for index, entry in enumerate(entries)]
    if record.get("system"):  # LLaMA-Factory's empty text says nothing
        turns.insert(0, literal_turn("system", checked_text(record["system"], "system")))
    if any(turn.role == "system" for turn in turns[1:]):
        raise TemplateError('"conversations" has a system turn that is not the first; expected it at the start only.')
    ignored = RECORD.unused(record, "", options.unknown_keys)
    ignored += unused_of_turns(entries, LLAVA_TURN, "conversations", options.unknown_keys)
    return Parsed(alternating(turns, "conversations"), images, ignored=tuple(ignored))


def parse_turn(entry: Any, place: str, has_images: bool) -> Turn:
    """A turn {"from", "value"}. Raises DataError."""
    if not isinstance(entry, Mapping) or "from" not in entry or "value" not in entry:
        raise DataError(f'{place} is {entry!r:.80}; expected an object with "from" and "value", as in {EXAMPLE}.')
    role = ROLES.get(entry["from"]) if isinstance(entry["from"], str) else None
    if role is None:
        raise TemplateError(f"{place}.from is {entry['from']!r:.80}; expected one of: {', '.join(ROLES)}.")
    text = checked_text(entry["value"], f"{place}.value")
    learned = len(entry) == 2 or is_learned(entry, role, place)
    return Turn(role, text, learned=learned) if has_images else literal_turn(role, text, learned)


DATASET = partial(FileRecords, parse=parse)
