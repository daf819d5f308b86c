"""Captions whose phrases have boxes (Flickr30k Entities in Shikra's form).

{"image_id": "36979", "boxes": [[24, 63, 76, 113], ..], "sentence": "<ph_st>A man<ph_ed> waits.", "boxes_seq": [[0]]}

The image is `image_id`.jpg. data/grounding/entities.py makes such records of the data set's own files.
"""

from __future__ import annotations

from typing import Any

from mindspeed_mm.data.grounding.phrases import MarkedText
from mindspeed_mm.data.grounding.reading import Chance, Fields, PublicSet, turns
from mindspeed_mm.data.keys import keys

KEYS = keys("a record of flickr30k", "image_id", "boxes", "sentence", "boxes_seq")


def caption(fields: Fields, boxes: list[list[float]]) -> MarkedText:
    """The sentence of a record."""
    return MarkedText.read(fields.text("sentence"), fields.value("boxes_seq"), '"sentence"', len(boxes))


def image_name(fields: Fields, key: str) -> str:
    """The file of an image by its id, a text or a number."""
    found = fields.value(key)
    return f"{found}.jpg" if type(found) is int else f"{fields.text(key)}.jpg"


def _item(fields: Fields, chance: Chance) -> dict[str, Any]:
    boxes = fields.boxes("boxes")
    text = caption(fields, boxes)
    answer, sequence = text.written(lambda number: text.boxes[number])
    return {
        "image": image_name(fields, "image_id"),
        "target": {"boxes": boxes},
        "conversations": turns(chance.question(), answer, answer_boxes=sequence),
    }


DATASET = PublicSet(
    "flickr30k",
    KEYS,
    _item,
    template="<image>\nDescribe the image in one sentence, with the boxes of the things that you name.",
    placeholders=("<image>",),
)
