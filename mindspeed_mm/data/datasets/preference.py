"""Preference records for DPO: {"prompt", "chosen", "rejected", "images"}; what `--objective dpo` trains on.

`prompt` is a text or a list of messages (also under "question"; LLaMA-Factory's "conversations" turns are taken, too);
`chosen` and `rejected` (HA-DPO's "reject") are a text, a turn, or a list whose last message is the answer, before which
the prompt may stand again. Without a prompt, both lists are whole conversations that differ in their last answer only
(as in TRL). Images without a place in the messages stand before the first question (as in TRL).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mindspeed_mm.constants import IMAGE_TOKEN
from mindspeed_mm.data.conversation import alternating, checked_text, count_images, literal_turn
from mindspeed_mm.data.datasets import sharegpt
from mindspeed_mm.data.datasets._files import FileRecords, Parsed, ReadOptions
from mindspeed_mm.data.datasets.messages import (
    Named,
    listed_images,
    merged_images,
    parse_messages,
    unused_of_files,
    unused_of_message,
)
from mindspeed_mm.data.keys import TEXTS, keys
from mindspeed_mm.data.sample import Turn
from mindspeed_mm.errors import DataError

RECORD = keys(
    "a record", "id", "image", "images", "prompt", "question", "conversations", "chosen", "rejected", "reject"
)
NO_MARKS = "both last answers are compared and nothing else is learned, so that a preference record has no marks"
MESSAGES = {
    (speaker, text): keys("a message", speaker, text, texts=TEXTS, marks=NO_MARKS)
    for speaker in ("role", "from")
    for text in ("content", "value")
}
"""The keys of a message by those that it has for speaker and text."""
EXAMPLE = '{"prompt": "<image>\\nWhat is it?", "chosen": "A cat.", "rejected": "A dog.", "images": ["cat.jpg"]}'


def parse(record: dict[str, Any], options: ReadOptions) -> Parsed:
    """Both conversations and the images of a record. Raises DataError for a broken one."""
    listed = listed_images(record)
    chosen = _side(record, ("chosen",))
    rejected = _side(record, ("rejected", "reject"))
    prompt, named = _prompt(record, len(listed))
    if prompt is None:
        whole, named = parse_messages(chosen, "chosen", bool(listed))
        other, others = parse_messages(rejected, "rejected", bool(listed))
        if not named and not others:
            whole, named = _with_places(whole, chosen, len(listed))
            other, _ = _with_places(other, rejected, len(listed))
        prompt, good, bad = whole[:-1], whole[-1], other[-1]
        shown = [count_images(turns) for turns in (whole, other)]
        if shown[0] != shown[1]:
            raise DataError(
                f'"chosen" shows {shown[0]} images and "rejected" {shown[1]}; expected the same images on both sides.'
            )
        if other[:-1] != prompt:
            raise DataError(
                '"chosen" and "rejected" differ before their last answer; expected the same prompt in both.'
            )
    else:
        good, bad = _answer(chosen, "chosen", prompt), _answer(rejected, "rejected", prompt)
    if good.role != "gpt" or bad.role != "gpt" or not prompt or prompt[-1].role != "human":
        raise DataError(f"the prompt must end with a question and both sides with an answer, as in {EXAMPLE}.")
    for key, turn in (("chosen", good), ("rejected", bad)):
        if not turn.text.strip():
            raise DataError(f'"{key}" is empty; expected an answer, as in {EXAMPLE}.')
    if good.text == bad.text:
        raise DataError('"chosen" and "rejected" are the same text; there is nothing to prefer. Remove the record.')
    ignored = RECORD.unused(record, "", options.unknown_keys) + unused_of_files(record, options.unknown_keys)
    for key in ("prompt", "question", "conversations", "chosen", "rejected", "reject"):
        ignored += _unused_of_side(record.get(key), key, options.unknown_keys)
    return Parsed((*prompt, good), merged_images(listed, named), (*prompt, bad), tuple(ignored))


def _unused_of_side(value: Any, key: str, policy: str) -> list[str]:
    """Keys that nothing reads in the messages under `key`, or in the one that stands there. Raises UnknownKeyError."""
    ignored: list[str] = []
    for index, entry in enumerate(value if isinstance(value, list) else [value]):
        if isinstance(entry, Mapping):
            allowed = MESSAGES["role" if "role" in entry else "from", "content" if "content" in entry else "value"]
            place, name = (f"{key}[{index}]", f"{key}[]") if isinstance(value, list) else (key, key)
            ignored += unused_of_message(entry, allowed, place, name, policy)
    return ignored


def _side(record: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    found = [key for key in names if key in record]
    if len(found) != 1:
        state = "missing" if not found else "given twice"
        wanted = " or ".join(f'"{name}"' for name in names)
        raise DataError(f'"{names[0]}" is {state}; expected one answer under {wanted}, as in {EXAMPLE}.')
    return record[found[0]]


def _with_places(turns: tuple[Turn, ...], entries: Any, images: int) -> tuple[tuple[Turn, ...], list[Named]]:
    """Turns whose messages have no place for the record's images: those of texts get them before the first question, as
    in TRL."""
    in_parts = any(isinstance(entry["content"], list) for entry in entries)
    first = next((place for place, turn in enumerate(turns) if turn.role == "human"), None)
    if in_parts or not images or first is None:
        return turns, []
    seeing = replace(turns[first], text=f"{IMAGE_TOKEN}\n" * images + turns[first].text)
    return (*turns[:first], seeing, *turns[first + 1 :]), [None] * images


def _prompt(record: Mapping[str, Any], images: int) -> tuple[tuple[Turn, ...] | None, list[Named]]:
    """Turns of the prompt, None where chosen and rejected hold it, and what is known of the images in it. `images`: how
    many the record lists."""
    found = [key for key in ("prompt", "question", "conversations") if key in record]
    if len(found) > 1:
        raise DataError(f'has "{found[0]}" and "{found[1]}"; keep one of them, as in {EXAMPLE}.')
    if not found:
        return None, []
    value = record[found[0]]
    if found[0] == "conversations" and isinstance(value, list):
        turns = [sharegpt.parse_turn(entry, f"conversations[{i}]", images > 0) for i, entry in enumerate(value)]
        count = sum(turn.text.count(IMAGE_TOKEN) - len(turn.literal) for turn in turns)
        return alternating(turns, "conversations"), [None] * count
    if isinstance(value, list):
        turns, named = parse_messages(value, found[0], images > 0)
        return (turns, named) if named else _with_places(turns, value, images)
    text = checked_text(value, found[0])
    if not images:
        return (literal_turn("human", text),), []
    if IMAGE_TOKEN not in text:  # HA-DPO's questions leave the placeholder to the reader
        text = f"{IMAGE_TOKEN}\n" * images + text
    return (Turn("human", text),), [None] * text.count(IMAGE_TOKEN)


def _answer(value: Any, key: str, prompt: Sequence[Turn]) -> Turn:
    """The answer of a side, in front of which a list may repeat the prompt."""
    if isinstance(value, list) and value:
        if len(value) > 1 and [_words(entry) for entry in value[:-1]] != [_words(turn.text) for turn in prompt]:
            raise DataError(
                f'"{key}" has {len(value) - 1} messages before its answer that are not the prompt; expected the answer '
                "alone, or the prompt again before it."
            )
        value = value[-1]
    if isinstance(value, Mapping):
        role = value.get("role", value.get("from"))
        if role not in ("assistant", "gpt"):
            raise DataError(f'"{key}" is from {role!r}; expected "assistant" (or "gpt").')
        value = value.get("content", value.get("value"))
        if isinstance(value, list):
            value = _joined_texts(value, key)
    return literal_turn("gpt", checked_text(value, key))


def _joined_texts(parts: Sequence[Any], key: str) -> str:
    """The text of an answer that is written in parts."""
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise DataError(
                f'"{key}" holds {part!r:.80} in its answer; expected {{"type": "text", "text": ..}} alone: images '
                "belong to the prompt."
            )
    return "".join(checked_text(part.get("text"), f"{key}.content[].text") for part in parts)


def _words(message: Any) -> str:
    """The text of a message, or a text, without the places of images."""
    if isinstance(message, Mapping):
        message = message.get("content", message.get("value"))
    if isinstance(message, list):
        message = "".join(str(part.get("text", "")) for part in message if isinstance(part, Mapping))
    return str(message).replace(IMAGE_TOKEN, "").strip()


DATASET = partial(FileRecords, parse=parse, pairs=True)
