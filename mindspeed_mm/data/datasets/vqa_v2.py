"""VQAv2: {"image_path": "a.jpg", "question": "..?", "annotation": {"multiple_choice_answer": "red"}}

A record without an annotation has the answer UNKNOWN, as in Shikra.
"""

from __future__ import annotations

from typing import Any

from mindspeed_mm.data.grounding.item import QUESTION
from mindspeed_mm.data.grounding.reading import Chance, Fields, PublicSet, turns
from mindspeed_mm.data.keys import keys

ASK = f"<image>\n{QUESTION}"
"""The question alone."""


def _item(fields: Fields, chance: Chance) -> dict[str, Any]:
    name = "annotation.multiple_choice_answer"
    answer = "UNKNOWN" if fields.value("annotation") is None else fields.plain(name)
    question = chance.question(question=fields.plain("question"))
    return {"image": fields.text("image_path"), "conversations": turns(question, f"The answer is {answer}.")}


DATASET = PublicSet(
    "vqa_v2",
    keys("a record of vqa_v2", "image_path", "question", "annotation"),
    _item,
    template=ASK,
    placeholders=("<image>", QUESTION),
)
