"""Circular evaluation (MMBench, Liu et al., ECCV 2024): a question counts when all rotations of it are right."""

import re
from collections.abc import Mapping, Sequence

ROTATION_OFFSET = 1_000_000
"""Rotation k of question i has the index i + k * 1,000,000 (MMBench's tables)."""

ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
"""Column names of VLMEvalKit's and XTuner's tables for MMBench's category names."""

XTUNER_NAMES = ABBREVIATIONS | {
    "sketch_reasoning": "Sketch Reasoning",
    "scenery_building": "Scenery & Building",
    "food_clothes": "Food & Clothes",
    "historical_figure": "Historical Figure",
    "traditional_show": "Traditional Show",
    "calligraphy_painting": "Calligraphy Painting",
    "cultural_relic": "Cultural Relic",
}

_XTUNER_LETTERS = re.compile("[A-D]+")


def question_of(index: int) -> int:
    """Index of the question that a row asks in some rotation."""
    return index % ROTATION_OFFSET


def kit_group(letters: Sequence[str | None], truths: Sequence[str]) -> int | None:
    """VLMEvalKit: 0 at the first readable wrong row, 1 if all are right, None if an unreadable row leaves it open."""
    for letter, truth in zip(letters, truths, strict=True):
        if letter and letter != truth:
            return 0
    return 1 if all(letters) else None


def strict_group(letters: Sequence[str | None], truths: Sequence[str], options: int) -> int:
    """1 if as many rotations as options are there and each is right."""
    return int(len(letters) >= options and list(letters) == list(truths))


def xtuner_letters(prediction: str) -> str:
    """XTuner: the first run of capitals A-D, wherever it stands."""
    match = _XTUNER_LETTERS.search(prediction)
    return match[0] if match else ""


def by_question(hits: Mapping[int, int]) -> dict[int, int]:
    """Plain conjunction of row hits per question whose first form is among the rows (XTuner)."""
    questions: dict[int, int] = {index: 1 for index in hits if index < ROTATION_OFFSET}
    for index, hit in hits.items():
        if question_of(index) in questions:
            questions[question_of(index)] &= hit
    return questions


def xtuner_table(meta: Sequence[Mapping], rows: Sequence[Mapping]) -> dict[str, float]:
    """XTuner's MMBench table: Average, then one accuracy per l2-category (or category) of the first forms."""
    truths = {row["index"]: row["answer"] for row in meta}
    hits = by_question(
        {row["index"]: int(xtuner_letters(str(row["prediction"])) == truths[row["index"]]) for row in rows}
    )
    column = "l2-category" if any("l2-category" in row for row in rows) else "category"
    groups: dict[str, list[int]] = {"Average": list(hits.values())}
    for row in rows:
        if row["index"] in hits and row.get(column):
            name = XTUNER_NAMES.get(row[column], row[column])
            groups.setdefault(name, []).append(hits[row["index"]])
    return {name: sum(own) / len(own) for name, own in groups.items()}
