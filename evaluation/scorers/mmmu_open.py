"""MMMU's rule for open questions (Yue et al., CVPR 2024): the answer's key phrases and numbers against the truth."""

import re
import string
from collections.abc import Mapping

from evaluation.scorers.cells import strict_answers
from evaluation.scorers.text import strip_special_tokens

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)

Value = float | str

OTHER_ANSWERS = "Other Answers"
"""Text of the wrong option that VLMEvalKit adds to open questions."""


def normalise(text: str) -> list[Value]:
    """A number rounded to two decimals, or lower-case text; one character gets a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def candidates(response: str) -> set[Value]:
    """What an answer may be saying: the shortest text behind a key phrase per line, and the numbers in these."""
    response = response.strip().strip(".").lower()
    lines = re.split(r"\.\s(?=[A-Z])|\n", response)
    keys = []
    for number, line in enumerate(lines):
        indicators = (*_INDICATORS, "=") if number == len(lines) - 1 else _INDICATORS
        tails = [line.split(indicator)[-1].strip() for indicator in indicators if indicator in line]
        tails = [tail for tail in tails if tail]
        shortest = min(tails, key=len, default="")
        if shortest and shortest not in _TRIVIAL:
            keys.append(shortest)
    keys = keys or [response]
    numbers = [found for key in keys for pattern in _NUMBERS for found in pattern.findall(key)]
    return {value for text in (*keys, *numbers) for value in normalise(text)}


def official_correct(answers: list[str], found: set[Value]) -> bool:
    """True when an accepted answer is inside a text candidate or equal to a number."""
    golds = [value for answer in answers for value in normalise(answer)]
    texts = [gold for gold in golds if isinstance(gold, str)]
    return any(any(g in value for g in texts) if isinstance(value, str) else value in golds for value in found)


def strict_correct(answer: str, prediction: str) -> bool:
    """The official rule, or the prediction is one of the accepted answers (`answer`: one text, or a quoted list)."""
    answers, prediction = strict_answers(answer), strip_special_tokens(prediction)
    if prediction.strip().lower() in (gold.strip().lower() for gold in answers):
        return True
    return official_correct(answers, candidates(prediction))


def kit_options(options: Mapping[str, str], answer: str) -> tuple[dict[str, str], str]:
    """VLMEvalKit's options and letter of a question: without an option A it asks answer against "Other Answers"."""
    if options.get("A"):
        return dict(options), answer
    gold = answer if len(answer) == 1 and answer in string.ascii_uppercase else "A"
    return {**options, "A": answer, "B": OTHER_ANSWERS}, gold
