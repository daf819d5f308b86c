"""Shikra's questions with reasons: a question, a chain of thought with boxes that ends in the answer, the answer.

{"img_path": "a.jpg", "boxes": [[24, 63, 76, 113]], "question": "Is the door<boxes> open?", "question_boxes_seq": [[0]],
"cot_with_ans": "The door<boxes> stands ajar. So the answer is yes.", "answer_boxes_seq": [[0]], "answer": "yes"}

The version says what is answered: a the answer alone, c the reasons without boxes, bc the reasons with boxes.
"""

from __future__ import annotations

from typing import Any

from mindspeed_mm.data.datasets.vqa_v2 import ASK
from mindspeed_mm.data.grounding.item import BOXES, QUESTION
from mindspeed_mm.data.grounding.reading import Chance, Fields, PublicSet, turns
from mindspeed_mm.data.keys import keys


def _item(fields: Fields, chance: Chance) -> dict[str, Any]:
    version = chance.settings.version
    question, sequences = fields.text("question"), {}
    if BOXES in question:
        sequences["question_boxes"] = fields.items("question_boxes_seq")
    if version == "a":
        answer = f"The answer is {fields.plain('answer')}."
    elif version == "c":
        answer = fields.text("cot_with_ans").replace(BOXES, "")
    else:
        answer, sequences["answer_boxes"] = fields.text("cot_with_ans"), fields.items("answer_boxes_seq")
    return {
        "image": fields.text("img_path"),
        "target": {"boxes": fields.boxes("boxes")},
        "conversations": turns(chance.question(question=question), answer, **sequences),
    }


DATASET = PublicSet(
    "gpt4gen",
    keys(
        "a record of gpt4gen",
        *("img_path", "boxes", "question", "question_boxes_seq", "cot_with_ans", "answer_boxes_seq", "answer"),
    ),
    _item,
    template=ASK,
    placeholders=("<image>", QUESTION),
    versions=("a", "c", "bc"),
)
