"""Relaxed accuracy of ChartQA (Masry et al., Findings of ACL 2022, section 5): 5 % for numbers, else equal texts."""

import re
from fractions import Fraction

from evaluation.scorers.cells import kit_answers, literal_answers, strict_answers
from evaluation.scorers.text import narrow, strip_special_tokens

TOLERANCE = 0.05
"""Largest relative error of a numeric answer (the paper)."""

_NUMBER = re.compile(r"([+-]?)((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE]([+-]?[0-9]+))?(%?)")
_MAX_DIGITS = 100
_MAX_EXPONENT = 400
"""Longer numerals are texts: no chart has them, and exact arithmetic on them could take very long."""


def kit_matches(answer: str, prediction: str) -> list[bool]:
    """VLMEvalKit: for each accepted answer, whether the prediction meets it. The score is any(...)."""
    return [_kit_match(gold, prediction.strip()) for gold in kit_answers(answer)]


def mindspeed_matches(answer: str, prediction: str) -> list[bool]:
    """MindSpeed-MM 2.1: as VLMEvalKit, but the error is relative to the prediction."""
    return [_kit_match(prediction.strip(), gold) for gold in literal_answers(answer)]


def _kit_match(gold, prediction) -> bool:
    gold, prediction = str(gold), str(prediction)
    target, value = _kit_float(gold), _kit_float(prediction)
    if value is not None and target:
        return abs(value - target) / abs(target) <= TOLERANCE
    return prediction.lower() == gold.lower()


def _kit_float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def strict_match(answer: str, prediction: str) -> bool:
    """The paper: within 5 % of the right value in exact arithmetic, boundary included; anything else must be equal.

    An answer "[a, b]" is one answer of two parts, each of which must be right.
    """
    prediction = narrow(strip_special_tokens(prediction)).strip()
    return any(_strict_one(narrow(gold).strip(), prediction) for gold in strict_answers(answer))


def _strict_one(gold: str, prediction: str) -> bool:
    if gold.startswith("[") and gold.endswith("]"):
        golds, parts = _parts(gold), _parts(prediction)
        return len(golds) == len(parts) and all(map(_strict_part, golds, parts))
    return _strict_part(gold, prediction)


def _parts(text: str) -> list[str]:
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    pieces = re.split(r",\s+", text.strip())
    if len(pieces) == 1 and parse_number(text) is None:
        pieces = text.split(",")
    return [piece.strip().strip("'\"") for piece in pieces]


def _strict_part(gold: str, prediction: str) -> bool:
    target, value = parse_number(gold), parse_number(prediction)
    if target is None or value is None:
        return gold.lower() == prediction.lower()
    return abs(value - target) <= Fraction(1, 20) * abs(target)


def parse_number(text: str) -> Fraction | None:
    """The value of a numeral: sign, digits with or without thousands commas, decimals, exponent, one per cent sign."""
    if len(text) > _MAX_DIGITS:
        return None
    match = _NUMBER.fullmatch(text)
    if match is None or abs(int(match[3] or 0)) > _MAX_EXPONENT:
        return None
    digits = match[2].replace(",", "")
    value = Fraction(f"0{digits}" if digits.startswith(".") else digits.rstrip(".")) * Fraction(10) ** int(
        match[3] or 0
    )
    return (-value if match[1] == "-" else value) / (100 if match[4] else 1)
