"""VQA-X, answers with a justification: {"file_path": "a.jpg", "question": "..?", "justification": "The door is red.",
"multiple_choice_answer": "red"}"""

from __future__ import annotations

from typing import Any

from mindspeed_mm.data.datasets.vqa_v2 import ASK
from mindspeed_mm.data.grounding.item import QUESTION
from mindspeed_mm.data.grounding.reading import Chance, Fields, PublicSet, reasoned, turns
from mindspeed_mm.data.keys import keys


def _item(fields: Fields, chance: Chance) -> dict[str, Any]:
    answer = reasoned(fields.plain("justification"), fields.plain("multiple_choice_answer"))
    question = chance.question(question=fields.plain("question"))
    return {"image": fields.text("file_path"), "conversations": turns(question, answer)}


DATASET = PublicSet(
    "vqa_x",
    keys("a record of vqa_x", "file_path", "question", "justification", "multiple_choice_answer"),
    _item,
    template=ASK,
    placeholders=("<image>", QUESTION),
)
