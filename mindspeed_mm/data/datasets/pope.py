"""POPE: {"image": "a.jpg", "text": "Is there a cat in the image?", "label": "yes"}, one record a line."""

from __future__ import annotations

from typing import Any

from mindspeed_mm.data.datasets.vqa_v2 import ASK
from mindspeed_mm.data.grounding.item import QUESTION
from mindspeed_mm.data.grounding.reading import Chance, Fields, PublicSet, turns
from mindspeed_mm.data.keys import keys
from mindspeed_mm.errors import DataError


def _item(fields: Fields, chance: Chance) -> dict[str, Any]:
    label = fields.text("label")
    if label not in ("yes", "no"):
        raise DataError(f'"label" is "{label}"; expected "yes" or "no".')
    question = chance.question(question=fields.plain("text"))
    return {"image": fields.text("image"), "conversations": turns(question, f"The answer is {label} .")}


DATASET = PublicSet(
    "pope",
    keys("a record of pope", "image", "text", "label", "question_id"),
    _item,
    template=ASK,
    placeholders=("<image>", QUESTION),
)
