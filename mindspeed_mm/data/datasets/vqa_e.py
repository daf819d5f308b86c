"""VQA-E, answers with an explanation: {"file_path": "a.jpg", "question": "..?", "explanation": ["The door is red.",
0.9], "multiple_answers": "red"}"""

from __future__ import annotations

from typing import Any

from mindspeed_mm.data.datasets.vqa_v2 import ASK
from mindspeed_mm.data.grounding.item import QUESTION
from mindspeed_mm.data.grounding.reading import Chance, Fields, PublicSet, reasoned, turns, without_placeholders
from mindspeed_mm.data.keys import keys
from mindspeed_mm.errors import DataError


def _item(fields: Fields, chance: Chance) -> dict[str, Any]:
    reasons = fields.items("explanation")
    if not reasons or not isinstance(reasons[0], str):
        raise DataError('"explanation" does not begin with a text; expected a list such as ["The door is red.", 0.9].')
    answer = reasoned(without_placeholders(reasons[0], '"explanation"[0]'), fields.plain("multiple_answers"))
    question = chance.question(question=fields.plain("question"))
    return {"image": fields.text("file_path"), "conversations": turns(question, answer)}


DATASET = PublicSet(
    "vqa_e",
    keys("a record of vqa_e", "file_path", "question", "explanation", "multiple_answers"),
    _item,
    template=ASK,
    placeholders=("<image>", QUESTION),
)
