"""Exact answers of Shikra's question sets (GQA, POPE, Point-QA): the words behind "the answer is", as they are."""

import re
from collections.abc import Sequence
from typing import Literal

Form = Literal["sentence", "point_qa"]
STARTS = {"sentence": re.compile(r"(?:So t|T)he answer is|Answer:"), "point_qa": re.compile(r"The answer is")}
"""`sentence` (GQA, POPE): the rest of the text, without its last dot. `point_qa`: up to the dot behind it."""


def final_answer(text: str, form: Form = "sentence") -> str | None:
    """The answer of a text, None where there is none or more than one."""
    pieces = STARTS[form].split(text)
    if len(pieces) != 2:
        return None
    rest = pieces[1].strip()
    if form == "sentence":
        return rest.removesuffix(".").strip()
    answer, dot, _ = rest.partition(".")
    return answer.strip() if dot else None


def exact_metrics(predictions: Sequence[str], targets: Sequence[str], form: Form = "sentence") -> dict[str, float]:
    """Accuracy over all targets, and how many predictions and targets could not be read.

    Upper and lower case count, nothing is normalised. A target that cannot be read counts as wrong. Raises ValueError
    for lists of different lengths.
    """
    hits = failed = target_failed = 0
    for prediction, target in zip(predictions, targets, strict=True):
        said, wanted = final_answer(prediction, form), final_answer(target, form)
        if wanted is None:
            target_failed += 1
            continue
        failed += said is None
        hits += said == wanted
    return {"accuracy": hits / len(targets) if targets else 0.0, "target_failed": target_failed, "failed": failed}
