"""Equality of texts: OCR-VQA and GQA."""

from evaluation.scorers.cells import kit_answers, strict_answers
from evaluation.scorers.text import strip_special_tokens


def kit_matches(answer: str, prediction: str) -> list[float]:
    """VLMEvalKit: per accepted answer, whether the stripped, lower-cased texts are equal.

    Raises AttributeError for an answer that is no text, as VLMEvalKit does.
    """
    return [float(gold.strip().lower() == prediction.strip().lower()) for gold in kit_answers(answer)]


def kit_best(answer: str, prediction: str) -> float:
    """VLMEvalKit's OCR-VQA score."""
    return max(kit_matches(answer, prediction))


def kit_mean(answer: str, prediction: str) -> float:
    """VLMEvalKit's GQA score; several accepted answers are averaged."""
    matches = kit_matches(answer, prediction)
    return sum(matches) / len(matches)


def strict_score(answer: str, prediction: str) -> float:
    """1.0 if the prediction equals one of the accepted answers, white space collapsed and case ignored."""
    given = _tidy(strip_special_tokens(prediction))
    return float(any(_tidy(gold) == given for gold in strict_answers(answer)))


def gqa_export(text: str) -> str:
    """LLaVA's form of an answer for GQA's own tool: no trailing periods, lower case."""
    return text.rstrip(".").lower()


def _tidy(text: str) -> str:
    return " ".join(text.lower().split())
