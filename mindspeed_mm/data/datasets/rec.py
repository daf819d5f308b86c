"""Referring expressions: where is ...? The answer is a box (RefCOCO, RefCOCO+, RefCOCOg, Visual Genome in Shikra's
form).

{"img_path": "a.jpg", "expression": "the red door", "bbox": [24, 63, 76, 113]}
"""

from __future__ import annotations

from typing import Any

from mindspeed_mm.data.grounding.item import BOXES, EXPRESSION
from mindspeed_mm.data.grounding.reading import Chance, Fields, PublicSet, turns
from mindspeed_mm.data.keys import keys

KEYS = keys("a record of rec", "img_path", "expression", "bbox")


def _item(fields: Fields, chance: Chance) -> dict[str, Any]:
    question = chance.question(expr=fields.plain("expression"))
    return {
        "image": fields.text("img_path"),
        "target": {"boxes": [fields.box("bbox")]},
        "conversations": turns(question, f"Answer: {BOXES} .", answer_boxes=[[0]]),
    }


DATASET = PublicSet(
    "rec",
    KEYS,
    _item,
    template=f"<image>\nWhere is {EXPRESSION}? Answer with its box.",
    placeholders=("<image>", EXPRESSION),
)
