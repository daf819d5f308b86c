"""ScienceQA answers as LLaVA's eval_science_qa reads them, and the strict form of that rule."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.scorers.text import strip_special_tokens

LETTERS = "ABCDE"
FAILED = "FAILED"
IMAGE_TAG = "<image>"

_STATED = re.compile(r"The answer is ([A-Z]).")
_STRICT_WHOLE = re.compile(r"([A-Z])|\(?([A-Z])\)?[.:)](?:\s.*)?|\(([A-Z])\)", re.DOTALL)
_STRICT_STATED = re.compile(r"the answer is \(?([A-Za-z])(?![A-Za-z0-9])", re.IGNORECASE)


def llava_parse(text: str) -> str:
    """Letter that LLaVA's script reads: the whole answer, its beginning "X. ", or the one "The answer is X?"."""
    if text in LETTERS and len(text) == 1:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    stated = _STATED.findall(text)
    return stated[0] if len(stated) == 1 else FAILED


def prediction_index(letter: str, choices: int) -> int:
    """Position of the letter among the first `choices` letters, -1 for any other text."""
    return LETTERS.index(letter) if len(letter) == 1 and letter in LETTERS[:choices] else -1


def llava_score(problems: Mapping[str, Mapping], predictions: Sequence[Mapping]) -> dict[str, Any]:
    """LLaVA's accuracies; a missing prediction is a failed one without an image.

    Raises ZeroDivisionError when no prompt has an image, as the public script does.
    """
    by_id = {record["question_id"]: record for record in predictions}
    results, parsed, with_image = {}, {}, []
    for name, problem in problems.items():
        record = by_id.get(name, {"text": FAILED, "prompt": ""})
        parsed[name] = llava_parse(record["text"])
        results[name] = prediction_index(parsed[name], len(problem["choices"]))
        if IMAGE_TAG in record["prompt"]:
            with_image.append(results[name] == problem["answer"])
    correct = sum(results[name] == problem["answer"] for name, problem in problems.items())
    return {
        "acc": correct / len(problems) * 100,
        "correct": correct,
        "count": len(problems),
        "img_accuracy_printed": f"{sum(with_image) / len(with_image) * 100:.2f}",
        "results": results,
        "parsed": parsed,
    }


def strict_index(text: str, choices: int) -> int | None:
    """Position of the letter that the stripped answer is, begins with (". : )" behind it), or states once."""
    text = strip_special_tokens(text).strip()
    match = _STRICT_WHOLE.fullmatch(text)
    if match:
        letters = {next(group for group in match.groups() if group)}
    else:
        letters = {letter.upper() for letter in _STRICT_STATED.findall(text)}
    index = prediction_index(letters.pop(), choices) if len(letters) == 1 else -1
    return None if index < 0 else index
