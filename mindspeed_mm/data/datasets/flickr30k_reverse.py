"""From boxes to a caption: the question shows boxes of some phrases, the answer is the caption. Records are those of
flickr30k.py.

Of each of at most box_max_num phrases one box is taken, all by chance. caption_with_box says which boxes the caption
has: none, those of the question, or all.
"""

from __future__ import annotations

from typing import Any

from mindspeed_mm.data.datasets.flickr30k import KEYS, caption, image_name
from mindspeed_mm.data.grounding.item import BOXES, OBJECTS
from mindspeed_mm.data.grounding.reading import Chance, Fields, PublicSet, turns
from mindspeed_mm.errors import DataError

ALSO = {"none": " Use words alone.", "question": " Repeat the boxes behind their words.", "all": ""}
"""What the question says about boxes in the caption."""


def _item(fields: Fields, chance: Chance) -> dict[str, Any]:
    boxes, draw, settings = fields.boxes("boxes"), chance.random, chance.settings
    text = caption(fields, boxes)
    grounded = [number for number, own in enumerate(text.boxes) if own]
    if not grounded:
        raise DataError('"boxes_seq" has no phrase with a box, which the question could show; remove the record.')
    picked = {
        number: draw.choice(text.boxes[number])
        for number in sorted(draw.sample(grounded, min(settings.box_max_num, len(grounded))))
    }
    asked = sorted(set(picked.values()))
    draw.shuffle(asked)
    keep = {
        "none": lambda number: (),
        "question": lambda number: (picked[number],) if number in picked else (),
        "all": lambda number: text.boxes[number],
    }
    answer, sequence = text.written(keep[settings.caption_with_box])
    question = chance.question(objs=BOXES) + ALSO[settings.caption_with_box]
    said = {"answer_boxes": sequence} if sequence else {}
    return {
        "image": image_name(fields, "image_id"),
        "target": {"boxes": boxes},
        "conversations": turns(question, answer, question_boxes=[asked], **said),
    }


DATASET = PublicSet(
    "flickr30k_reverse",
    KEYS,
    _item,
    template=f"<image>\nWrite a caption that names what is in {OBJECTS}.",
    placeholders=("<image>", OBJECTS),
    uses=("box_max_num", "caption_with_box"),
)
