"""Visual7W, pointing: which of four boxes answers a question.

{"file_path": "a.jpg", "question": "Which door is open?", "candidates": [[..], [..], [..]], "answer": [24, 63, 76, 113],
"point": [50, 88]}

The candidates and the answer are listed as boxes, in an order by chance. The version says whether the answer is a box
(b) or the point in it (p).
"""

from __future__ import annotations

from typing import Any

from mindspeed_mm.data.datasets.vqa_v2 import ASK
from mindspeed_mm.data.grounding.item import BOXES, POINTS, QUESTION
from mindspeed_mm.data.grounding.reading import Chance, Fields, PublicSet, turns
from mindspeed_mm.data.keys import keys


def _item(fields: Fields, chance: Chance) -> dict[str, Any]:
    answer = fields.box("answer")
    boxes = [answer, *(box for box in fields.boxes("candidates") if box != answer)]
    order = list(range(len(boxes)))
    chance.random.shuffle(order)
    question = chance.question(question=f"{fields.plain('question')} Candidates: {' '.join([BOXES] * len(boxes))} .")
    asked = {"question_boxes": [[number] for number in order]}
    if chance.settings.version == "b":
        target, text, said = {"boxes": boxes}, f"Answer: {BOXES} .", {"answer_boxes": [[0]]}
    else:
        target = {"boxes": boxes, "points": [fields.point("point")]}
        text, said = f"Answer: {POINTS} .", {"answer_points": [[0]]}
    return {
        "image": fields.text("file_path"),
        "target": target,
        "conversations": turns(question, text, **asked, **said),
    }


DATASET = PublicSet(
    "v7w_point",
    keys("a record of v7w_point", "file_path", "question", "candidates", "point", "answer"),
    _item,
    template=ASK,
    placeholders=("<image>", QUESTION),
    versions=("b", "p"),
)
