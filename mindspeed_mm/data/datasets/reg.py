"""The other way round: what is in this box? (REG of RefCOCO, GC of Visual Genome.) Records are those of rec.py.

caption_min_words and caption_max_words take expressions with more and with fewer words than these.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from mindspeed_mm.data.chosen_records import Choose
from mindspeed_mm.data.datasets.rec import KEYS
from mindspeed_mm.data.grounding.item import BOXES, OBJECTS
from mindspeed_mm.data.grounding.parameters import GroundingParameters
from mindspeed_mm.data.grounding.reading import Chance, Fields, PublicSet, turns


def _item(fields: Fields, chance: Chance) -> dict[str, Any]:
    return {
        "image": fields.text("img_path"),
        "target": {"boxes": [fields.box("bbox")]},
        "conversations": turns(chance.question(objs=BOXES), fields.plain("expression"), question_boxes=[[0]]),
    }


def _choose(settings: GroundingParameters) -> tuple[Choose, dict[str, Any]] | None:
    least, most = settings.caption_min_words, settings.caption_max_words
    if least is None and most is None:
        return None
    key = {"caption_min_words": least, "caption_max_words": most}
    return partial(_with_length, least=-1 if least is None else least, most=math.inf if most is None else most), key


def _with_length(record: dict[str, Any], least: int, most: float) -> list[dict[str, Any]]:
    expression = record.get("expression")
    is_right = not isinstance(expression, str) or least < len(expression.split()) < most  # others are told when read
    return [record] if is_right else []


DATASET = PublicSet(
    "reg",
    KEYS,
    _item,
    template=f"<image>\nDescribe what is in {OBJECTS}, so that nothing else fits.",
    placeholders=("<image>", OBJECTS),
    uses=("caption_min_words", "caption_max_words"),
    choose=_choose,
)
