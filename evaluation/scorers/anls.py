"""Average normalised Levenshtein similarity (Biten et al., ICCV 2019, equation 1), for DocVQA and InfographicVQA."""

from evaluation.scorers.cells import kit_answers, strict_answers
from evaluation.scorers.text import strip_special_tokens

THRESHOLD = 0.5
"""The paper's tau: a normalised distance from here on scores 0."""


def levenshtein(first: str, second: str) -> int:
    """Edit distance, by one row of the table at a time."""
    if len(first) < len(second):
        first, second = second, first
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def kit_distances(answer: str, prediction: str) -> list[float]:
    """VLMEvalKit: per accepted answer the distance of the tidied texts over the length of the longer raw one."""
    return [_kit_distance(str(gold), prediction) for gold in kit_answers(answer)]


def _kit_distance(gold: str, prediction: str) -> float:
    length = max(len(gold.upper()), len(prediction.upper()))
    return levenshtein(_tidy(gold), _tidy(prediction)) / length if length else 0.0


def kit_score(answer: str, prediction: str) -> float:
    """VLMEvalKit: similarity to the nearest answer, 0 below 0.5; a similarity of 0.5 is kept."""
    similarity = 1 - min(kit_distances(answer, prediction))
    return similarity if similarity >= THRESHOLD else 0.0


def stvqa_score(answers: list[str], prediction: str) -> float:
    """LLaVA's ST-VQA scorer: inner white space counts. Raises ZeroDivisionError when both texts are empty."""
    prediction = prediction.strip().lower()
    best = 0.0
    for gold in (answer.strip().lower() for answer in answers):
        best = max(best, 1 - levenshtein(gold, prediction) / max(len(gold), len(prediction)))
    return best if best >= THRESHOLD else 0.0


def strict_score(answer: str, prediction: str) -> float:
    """The paper: 1 - NL if NL < 0.5, else 0, on the tidied texts; the best of the accepted answers."""
    return strict_best(strict_answers(answer), prediction)


def strict_best(answers: list[str], prediction: str) -> float:
    """As strict_score, for a list of accepted answers."""
    prediction = _tidy(strip_special_tokens(prediction))
    return max(_similarity(_tidy(gold), prediction) for gold in answers)


def _similarity(gold: str, prediction: str) -> float:
    length = max(len(gold), len(prediction))
    if not length:
        return 1.0
    if abs(len(gold) - len(prediction)) >= THRESHOLD * length:
        return 0.0  # so many insertions at least, without filling the table for a very long answer
    distance = levenshtein(gold, prediction) / length
    return 1 - distance if distance < THRESHOLD else 0.0


def _tidy(text: str) -> str:
    return " ".join(text.lower().split())
