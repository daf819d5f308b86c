"""Conversations of records, checked and brought into the form that templates take.

`conversation_turns` is LLaVA's own format with LLaVA's own clean-up; other formats (`data/datasets`) share the checks
here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from mindspeed_mm.constants import IMAGE_TOKEN
from mindspeed_mm.data.keys import is_learned
from mindspeed_mm.data.sample import Turn
from mindspeed_mm.errors import DataError, TemplateError

ROLES = ("human", "gpt")
TURNS = '[{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]'
EXAMPLE = f'{{"id": "1", "image": "coco/1.jpg", "conversations": {TURNS}}}'
"""A record of LLaVA's format, for messages."""

OTHER_KEYS = {"messages": "messages", "chosen": "preference"}
"""Keys that tell another format -> its dataset_type."""


def record_images(record: Mapping[str, Any]) -> list[str]:
    """Image names of a record: `image` (or `images`) is a name or a list of names; empty for a text-only record.

    A key without a value (null, "", []) says nothing. Raises DataError when both keys are given, a name is not a
    non-empty string, or it is an address of the web.
    """
    given = [key for key in ("image", "images") if record.get(key) not in (None, "", [])]
    if len(given) > 1:
        raise DataError('has both "image" and "images"; keep one of them.')
    if not given:
        return []
    key, value = given[0], record[given[0]]
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(
            f'"{key}" is {shown(value)}; expected the name of an image or a list of names, such as "coco/1.jpg".'
        )
    for name in names:
        refuse_web_address(name, key)
    return names


def refuse_web_address(name: str, place: str) -> None:
    """Raise DataError for an image that would have to be downloaded, or that stands in its own address."""
    if name.startswith(("http://", "https://", "data:")):
        raise DataError(f"{place} is {name[:80]!r}; expected a file in data_folder: nothing is downloaded. Fetch it.")


def conversation_turns(
    conversation: Mapping[str, Any] | Sequence[Any], *, images_first: bool = True
) -> tuple[Turn, ...]:
    """Turns of a record (`{"conversations": [{"from", "value"}, ...], "image": ...}`) or of its conversations list.

    As LLaVA does before training (preprocess_multimodal and the template functions of its train.py):
    - an `<image>` is moved to the front of its turn, followed by a line feed; several in one turn become one, except in
      a record with a list of several images, where each keeps its own;
    - a leading gpt turn is dropped; after that human and gpt alternate.
    `images_first=False` leaves every `<image>` where it was written instead.

    Raises DataError for a record without usable conversations, TemplateError for unknown or misplaced roles.
    """
    if isinstance(conversation, Mapping):
        keep_count = len(record_images(conversation)) > 1
        entries = conversation.get("conversations")
    else:
        keep_count, entries = False, conversation
    if isinstance(entries, str) or not isinstance(entries, Sequence) or not entries:
        raise DataError(
            f'"conversations" is {_state(conversation, entries)}; expected a list of turns, such as {TURNS}.'
        )
    return alternating(
        [_turn(entry, index, images_first, keep_count) for index, entry in enumerate(entries)], "conversations"
    )


def _state(conversation: Mapping[str, Any] | Sequence[Any], entries: Any) -> str:
    """What is there in place of turns, with a hint where the record is of another format."""
    if not isinstance(conversation, Mapping) or "conversations" in conversation:
        return shown(entries)
    kinds = [f'"{kind}" reads records with "{key}"' for key, kind in OTHER_KEYS.items() if key in conversation]
    hint = f"; the dataset_type {kinds[0]}" if kinds else ""
    return f"missing (the record has {', '.join(map(shown, conversation)) or 'no keys'}{hint})"


def alternating(turns: Sequence[Turn], key: str) -> tuple[Turn, ...]:
    """Turns without a leading gpt turn. Raises TemplateError unless human and gpt alternate after a system turn.

    `key` names the list of turns in messages.
    """
    start = 1 if turns and turns[0].role == "system" else 0
    dropped = 1 if len(turns) > start and turns[start].role == "gpt" else 0
    kept = [*turns[:start], *turns[start + dropped :]]
    if len(kept) == start:
        raise DataError(f'"{key}" holds only a gpt turn; expected a human turn that it answers, as in {TURNS}.')
    for index, turn in enumerate(kept[start:]):
        if turn.role != ROLES[index % 2]:
            raise TemplateError(
                f'{key}[{index + start + dropped}] is from "{turn.role}", expected "{ROLES[index % 2]}": human and gpt '
                f"alternate, as in {TURNS}. Merge the turns of one speaker, or split the record."
            )
    return tuple(kept)


def literal_turn(role: Literal["human", "gpt", "system"], text: str, learned: bool = True) -> Turn:
    """A turn in which no `<image>` stands for an image."""
    return Turn(role, text, tuple(match.start() for match in re.finditer(re.escape(IMAGE_TOKEN), text)), learned)


def checked_text(value: Any, place: str) -> str:
    """A text of a record. `place` names it in messages. Raises DataError for what is no text."""
    if not isinstance(value, str):
        raise DataError(f'{place} is {shown(value)}; expected a text in quotes, such as "A cat.".')
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place} holds half of a surrogate pair at character {error.start} ({ascii(value[error.start])}); "
                r'expected whole characters, such as "\ud83d\ude00" or the character itself. Correct the text.'
            ) from error
    return value


def count_images(turns: Sequence[Turn]) -> int:
    """Number of image placeholders."""
    return sum(turn.text.count(IMAGE_TOKEN) - len(turn.literal) for turn in turns)


def _turn(entry: Any, index: int, images_first: bool, keep_count: bool) -> Turn:
    if isinstance(entry, Turn):
        return replace(entry, text=_images_first(entry.text, keep_count)) if images_first else entry
    if not isinstance(entry, Mapping) or "from" not in entry or "value" not in entry:
        raise DataError(
            f'conversations[{index}] is {shown(entry)}; expected an object with "from" and "value", as in {TURNS}.'
        )
    role = entry["from"]
    if role not in ROLES:
        hint = ' The dataset_type "sharegpt" reads other names of the two.' if role in ("user", "assistant") else ""
        raise TemplateError(
            f'conversations[{index}].from is {shown(role)}; expected "human" or "gpt", as in {TURNS}.{hint}'
        )
    text = checked_text(entry["value"], f"conversations[{index}].value")
    learned = len(entry) == 2 or is_learned(entry, role, f"conversations[{index}]")
    return Turn(role, _images_first(text, keep_count) if images_first else text, learned=learned)


def _images_first(text: str, keep_count: bool) -> str:
    """LLaVA's preprocess_multimodal for one turn."""
    found = text.count(IMAGE_TOKEN)
    if not found:
        return text
    rest = text.replace(IMAGE_TOKEN, "").strip()
    return (f"{IMAGE_TOKEN}\n" * (found if keep_count else 1) + rest).strip()


def shown(value: Any) -> str:
    """A value for messages, not too long."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:80] + "..."
