"""A LLaVA record's conversation, checked and brought into the form that LLaVA trains on."""

from collections.abc import Mapping, Sequence
from typing import Any

from mindspeed_mm.constants import IMAGE_TOKEN
from mindspeed_mm.data.sample import Turn
from mindspeed_mm.errors import DataError, TemplateError

ROLES = ("human", "gpt")


def record_images(record: Mapping[str, Any]) -> list[str]:
    """Image names of a record: `image` (or `images`) is a name or a list of names; empty for a text-only record.

    Raises DataError when both keys are given or a name is not a non-empty string.
    """
    if "image" in record and "images" in record:
        raise DataError('has both "image" and "images"; keep one of them.')
    key = "images" if "images" in record else "image"
    value = record.get(key)
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f'"{key}" is {value!r}; expected the name of an image or a list of names.')
    return names


def conversation_turns(conversation: Mapping[str, Any] | Sequence[Any]) -> tuple[Turn, ...]:
    """Turns of a record (`{"conversations": [{"from", "value"}, ...], "image": ...}`) or of its conversations list.

    As LLaVA does before training (preprocess_multimodal and the template functions of its train.py):
    - an `<image>` is moved to the front of its turn, followed by a line feed; several in one turn become one, except in
      a record with a list of several images, where each keeps its own;
    - a leading gpt turn is dropped; after that human and gpt alternate.

    Raises DataError for a record without usable conversations, TemplateError for unknown or misplaced roles.
    """
    if isinstance(conversation, Mapping):
        keep_count = len(record_images(conversation)) > 1
        entries = conversation.get("conversations")
    else:
        keep_count, entries = False, conversation
    if isinstance(entries, str) or not isinstance(entries, Sequence) or not entries:
        raise DataError(f'"conversations" is {_shown(entries)}; expected a list of {{"from", "value"}} turns.')
    turns = [_turn(entry, index, keep_count) for index, entry in enumerate(entries)]
    dropped = 1 if turns[0].role == "gpt" else 0
    turns = turns[dropped:]
    if not turns:
        raise DataError('"conversations" holds only a gpt turn; expected a human turn that it answers.')
    for index, turn in enumerate(turns):
        if turn.role != ROLES[index % 2]:
            raise TemplateError(
                f'conversations[{index + dropped}] is from "{turn.role}", expected "{ROLES[index % 2]}": human and gpt '
                "alternate. Merge the turns of one speaker, or split the record."
            )
    return tuple(turns)


def count_images(turns: Sequence[Turn]) -> int:
    """Number of image placeholders."""
    return sum(turn.text.count(IMAGE_TOKEN) for turn in turns)


def _turn(entry: Any, index: int, keep_count: bool) -> Turn:
    if isinstance(entry, Turn):
        return Turn(entry.role, _images_first(entry.text, keep_count))
    if not isinstance(entry, Mapping) or "from" not in entry or "value" not in entry:
        raise DataError(f'conversations[{index}] is {_shown(entry)}; expected an object with "from" and "value".')
    role, text = entry["from"], entry["value"]
    if role not in ROLES:
        raise TemplateError(f'conversations[{index}].from is {_shown(role)}; expected "human" or "gpt".')
    if not isinstance(text, str):
        raise DataError(f"conversations[{index}].value is {_shown(text)}; expected a string.")
    return Turn(role, _images_first(text, keep_count))


def _images_first(text: str, keep_count: bool) -> str:
    """LLaVA's preprocess_multimodal for one turn."""
    found = text.count(IMAGE_TOKEN)
    if not found:
        return text
    rest = text.replace(IMAGE_TOKEN, "").strip()
    return (f"{IMAGE_TOKEN}\n" * (found if keep_count else 1) + rest).strip()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."
