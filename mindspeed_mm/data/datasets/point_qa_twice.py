"""Point-QA, looking twice: a question about things like the one at a point.

{"file_path": "a.jpg", "obj_question": "How many of these doors?", "super_question": "How many of these things?",
"general_question": "How many of these?", "point": [50, 88], "bbox": [24, 63, 76, 113], "answer": "2"}

The version is `QUESTION-PLACE`: the question obj, super or general, and b, p or bp as in point_qa_local.py.
"""

from __future__ import annotations

from typing import Any

from mindspeed_mm.data.datasets.vqa_v2 import ASK
from mindspeed_mm.data.grounding.item import QUESTION
from mindspeed_mm.data.grounding.reading import Chance, Fields, PublicSet, pointed
from mindspeed_mm.data.keys import keys

QUESTIONS = ("obj", "super", "general")


def _item(fields: Fields, chance: Chance) -> dict[str, Any]:
    kind, place = str(chance.settings.version).split("-")
    return pointed(fields, chance, fields.plain(f"{kind}_question"), place)


DATASET = PublicSet(
    "point_qa_twice",
    keys(
        "a record of point_qa_twice",
        *("file_path", "point", "bbox", "answer"),
        *(f"{kind}_question" for kind in QUESTIONS),
    ),
    _item,
    template=ASK,
    placeholders=("<image>", QUESTION),
    versions=tuple(f"{kind}-{place}" for kind in QUESTIONS for place in ("p", "b", "bp")),
)
