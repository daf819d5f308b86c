"""Equality of texts: OCR-VQA and GQA."""

from evaluation.scorers.cells import kit_answers, strict_answers
from evaluation.scorers.text import strip_special_tokens


def kit_matches(answer: str, prediction: str) -> list[float]:
    """VLMEvalKit: per accepted answer, whether the stripped, lower-cased texts are equal.

    Raises AttributeError for an answer that is no text, as VLMEvalKit does.
    """
    return [_equal(gold, prediction) for gold in kit_answers(answer)]


def kit_best(answer: str, prediction: str) -> float:
    """VLMEvalKit's OCR-VQA score; a number in a list, which stops VLMEvalKit, is compared as text."""
    return max(_equal(str(gold), prediction) for gold in kit_answers(answer))


def kit_mean(answer: str, prediction: str) -> float:
    """VLMEvalKit's GQA score: several accepted answers are averaged; numbers as in kit_best."""
    matches = [_equal(str(gold), prediction) for gold in kit_answers(answer)]
    return sum(matches) / len(matches)


def _equal(gold: str, prediction: str) -> float:
    return float(gold.strip().lower() == prediction.strip().lower())


def strict_score(answer: str, prediction: str) -> float:
    """1.0 if the prediction equals one of the accepted answers, white space collapsed and case ignored."""
    given = _tidy(strip_special_tokens(prediction))
    return float(any(_tidy(gold) == given for gold in strict_answers(answer)))


def gqa_export(text: str) -> str:
    """LLaVA's form of an answer for GQA's own tool: no trailing periods, lower case."""
    return text.rstrip(".").lower()


def _tidy(text: str) -> str:
    return " ".join(text.lower().split())
