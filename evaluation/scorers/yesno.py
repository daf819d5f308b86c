"""Answers to yes-no questions, and the rates of POPE (Li et al., EMNLP 2023)."""

import re
from collections.abc import Iterable, Mapping, Sequence

from evaluation.scorers.text import fold, strip_special_tokens
from evaluation.scorers.vqa import remove_marks

UNKNOWN = "unknown"
POPE_SETS = ("random", "popular", "adversarial")
MME_PERCEPTION = (
    *("OCR", "artwork", "celebrity", "color", "count"),
    *("existence", "landmark", "position", "posters", "scene"),
)
MME_REASONING = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")
"""The categories of MME's paper (Fu et al., 2023); 100 + 100 points each."""

_YES_WORDS = frozenset(["yes", "yeah", "yep", "yup"])
_NO_WORDS = frozenset(["no", "nope"])
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_QUOTED_PHRASE = re.compile(r'"[^"]*\s[^"]*"')
_SENTENCE_END = re.compile(r"[.!?\n\u3002]")
_CANNOT_SEE = re.compile(r"\b(?:cannot|can't|can not|don't|do not) (?:see|find|spot|detect)\b")
_NOT = re.compile(r"\bnot\b(?! (?:sure|certain)\b)|\b(?:isn|aren|wasn|weren|doesn|hasn|haven)'t\b")
_THERE_IS = re.compile(r"\b(?:there is|there are|there's|i see|i can see|it shows|it contains)\b")


def kit_answer(text: str) -> str:
    """VLMEvalKit: Yes, No or Unknown, by the words left when marks are removed."""
    words = remove_marks(text.lower()).split()
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"


def strict_answer(text: str) -> str:
    """ "yes", "no" or "unknown": the one polarity that the answer words have. "no" before a word is a determiner."""
    return _read(_prepare(text))[0]


def pope_strict_answer(text: str) -> str:
    """As strict_answer; where no answer word stands, the first sentence may say that something is there or is not."""
    text = _prepare(text)
    answer, both = _read(text)
    if answer != UNKNOWN or both:
        return answer
    first = _SENTENCE_END.split(text.strip(), maxsplit=1)[0]
    if _CANNOT_SEE.search(first) or _NOT.search(first):
        return "no"
    return "yes" if _THERE_IS.search(first) else UNKNOWN


def _prepare(text: str) -> str:
    return _QUOTED_PHRASE.sub(" ", fold(strip_special_tokens(text)).lower())


def _read(text: str) -> tuple[str, bool]:
    """The answer, and whether both polarities occur."""
    yes = no = determiner = False
    for match in _WORD.finditer(text):
        word, rest = match[0], text[match.end() : match.end() + 2]
        yes |= word in _YES_WORDS
        if word == "no" and _WORD.match(rest.lstrip(" ")) and rest.startswith(" "):
            determiner = True
        else:
            no |= word in _NO_WORDS
    if yes and no:
        return UNKNOWN, True
    if yes or no:
        return ("yes" if yes else "no"), False
    return ("no" if determiner else UNKNOWN), False


def pope_llava_answer(text: str) -> str:
    """LLaVA's and POPE's own rule: "no" if the first sentence has the word No, no or not, everything else "yes"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope_llava_metrics(answers: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """LLaVA's counts and rates, answers paired by order. Raises ZeroDivisionError as the public script does."""
    pairs = [(pope_llava_answer(text), "no" if label == "no" else "yes") for text, label in zip(answers, labels)]  # noqa: B905 -- the shorter list ends it
    counts = _counts(pairs)
    tp, fp, fn = counts["TP"], counts["FP"], counts["FN"]
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    yes = sum(pope_llava_answer(text) == "yes" for text in answers)
    return counts | {
        "accuracy": (tp + counts["TN"]) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "yes_ratio": yes / len(answers),
    }


def pope_metrics(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Counts and rates (0..1) of pairs (answer, label); an unknown answer is wrong and never a yes. 0/0 is 0."""
    pairs = list(pairs)
    counts = _counts(pairs)
    tp, fp, fn = counts["TP"], counts["FP"], counts["FN"]
    yes = sum(answer == "yes" for answer, _ in pairs)
    return counts | {
        "unknown": sum(answer == UNKNOWN for answer, _ in pairs),
        "accuracy": ratio(tp + counts["TN"], len(pairs)),
        "precision": ratio(tp, tp + fp),
        "recall": ratio(tp, tp + fn),
        "f1": ratio(2 * tp, 2 * tp + fp + fn),
        "yes_ratio": ratio(yes, len(pairs)),
    }


def _counts(pairs: Iterable[tuple[str, str]]) -> dict[str, int]:
    """An unknown answer to a question whose answer is yes is a false negative; to another one it is in no count."""
    counts = {"TP": 0, "FP": 0, "TN": 0, "FN": 0}
    for answer, label in pairs:
        if label == "yes":
            counts["TP" if answer == "yes" else "FN"] += 1
        elif answer != UNKNOWN:
            counts["FP" if answer == "yes" else "TN"] += 1
    return counts


def ratio(part: float, whole: float) -> float:
    """part / whole, 0 for an empty whole."""
    return part / whole if whole else 0.0


def kit_pope_table(rows: Sequence[Mapping[str, str | bool]]) -> dict[str, dict[str, float]]:
    """VLMEvalKit's POPE table (x100) of rows with category (a comma list), answer, extracted and score.

    A row is counted once per set it is in; the line "Overall" is over all these repeated rows, not a mean of sets.
    """
    repeated = [(name, row) for row in rows for name in str(row["category"]).split(",")]
    names = ["Overall", *sorted({name for name, _ in repeated})]
    return {name: _kit_rates([row for own, row in repeated if name in ("Overall", own)]) for name in names}


def _kit_rates(rows: Sequence[Mapping[str, str | bool]]) -> dict[str, float]:
    said = [row["extracted"] == "Yes" for row in rows]
    right = [row["answer"] == "Yes" for row in rows]
    hits = sum(a and b for a, b in zip(said, right, strict=True))
    precision, recall = ratio(hits, sum(said)), ratio(hits, sum(right))
    return {
        "Overall": 100 * ratio(2 * precision * recall, precision + recall),
        "acc": 100 * ratio(sum(bool(row["score"]) for row in rows), len(rows)),
        "precision": 100 * precision,
        "recall": 100 * recall,
    }
