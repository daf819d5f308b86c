"""ScienceQA: the problems of its problems.json, one a line, with or without an image.

{"id": "1", "image": "1/image.png", "question": "Which is a solid?", "choices": ["rice", "milk"], "answer": 0, "hint":
"", "lecture": "A solid keeps its shape.", "solution": "Rice does."}

The version a answers with the letter, c with lecture and solution before it.
"""

from __future__ import annotations

from typing import Any

from mindspeed_mm.constants import IMAGE_TOKEN
from mindspeed_mm.data.conversation import shown
from mindspeed_mm.data.datasets.vqa_v2 import ASK
from mindspeed_mm.data.grounding.item import QUESTION
from mindspeed_mm.data.grounding.reading import Chance, Fields, PublicSet, turns, without_placeholders
from mindspeed_mm.data.keys import keys
from mindspeed_mm.errors import DataError

LETTERS = "ABCDEFGHIJ"


def _item(fields: Fields, chance: Chance) -> dict[str, Any]:
    choices, label = fields.items("choices"), fields.value("answer")
    if not 2 <= len(choices) <= len(LETTERS) or type(label) is not int or not 0 <= label < len(choices):
        raise DataError(
            f'"choices" has {len(choices)} entries and "answer" is {shown(label)}; expected 2 to {len(LETTERS)}, and '
            "the number of the right one, from 0 on."
        )
    lines = [fields.plain("hint")] if fields.value("hint") else []
    lines.append(fields.plain("question"))
    for number, choice in enumerate(choices):
        place = f'"choices"[{number}]'
        if not isinstance(choice, str):
            raise DataError(f"{place} is {shown(choice)}; expected a text.")
        lines.append(f"{LETTERS[number]}. {without_placeholders(choice, place)}")
    reasons = [fields.plain(name) for name in ("lecture", "solution") if fields.value(name)]
    reasons = reasons if chance.settings.version == "c" else []
    question = chance.question(question="\n".join(lines))
    record = {"conversations": turns(question, " ".join([*reasons, f"The answer is {LETTERS[label]}."]))}
    if fields.value("image"):
        return record | {"image": fields.text("image")}
    record["conversations"][0]["value"] = question.replace(IMAGE_TOKEN, "").strip()
    return record


DATASET = PublicSet(
    "science_qa",
    keys(
        "a record of science_qa",
        *("image", "question", "choices", "answer", "hint", "lecture", "solution"),
        *("grade", "subject", "skill"),
    ),
    _item,
    template=ASK,
    placeholders=("<image>", QUESTION),
    versions=("a", "c"),
)
