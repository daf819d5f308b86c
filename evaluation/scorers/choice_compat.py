"""The letter that VLMEvalKit's exact matching reads from an answer (version 0.2rc1; VERBOSE unset, no judge)."""

import re
from collections.abc import Mapping

UNREADABLE = "Z"
"""Letter that VLMEvalKit notes for an answer without a readable option; it is never right."""

_API_FAILURE = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_MARKS_TO_SPACE = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"(?:correct )?answer is\s+\**\s*([a-d])", re.IGNORECASE)
_LAST_WORDS = 4


def read_choice(answer: str, options: Mapping[str, str]) -> str | None:
    """Letter of the option that `answer` names, "Z" for a refusal, or None.

    `options` maps letters to texts as VLMEvalKit holds them, missing options left out.
    """
    return _by_letter(answer, options) or _by_text(answer, options)


def _by_letter(answer: str, options: Mapping[str, str]) -> str | None:
    if _API_FAILURE in answer:
        return None
    if any(refusal in answer for refusal in _REFUSALS):
        return UNREADABLE
    words = answer.translate(_MARKS_TO_SPACE).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST_WORDS:
        return named[0]
    if not named and UNREADABLE in words:
        return UNREADABLE
    stated = _ANSWER_IS.search(answer)
    if stated and stated[1].upper() in options:
        return stated[1].upper()
    return None


def _by_text(answer: str, options: Mapping[str, str]) -> str | None:
    answer = answer.lower()
    if len(answer) > 2 * sum(len(text) for text in options.values()):
        return None
    contained = [letter for letter, text in options.items() if text.lower() in answer]
    return contained[0] if len(contained) == 1 else None


def mindspeed_read_choice(answer: str, options: Mapping[str, str]) -> str | None:
    """Letter by MindSpeed-MM's older form of the rule: anywhere in the answer, no "answer is", no limit of length."""
    if _API_FAILURE in answer:
        letter = None
    elif any(refusal in answer for refusal in _REFUSALS):
        letter = UNREADABLE
    else:
        words = answer.translate(_MARKS_TO_SPACE).split()
        named = [letter for letter in options if letter in words]
        letter = named[0] if len(named) == 1 else UNREADABLE if not named and UNREADABLE in words else None
    if letter:
        return letter
    contained = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return contained[0] if len(contained) == 1 else None
