"""Captions: {"img_path": "a.jpg", "caption": "A red door."}"""

from __future__ import annotations

from typing import Any

from mindspeed_mm.data.grounding.reading import Chance, Fields, PublicSet, turns
from mindspeed_mm.data.keys import keys


def _item(fields: Fields, chance: Chance) -> dict[str, Any]:
    return {"image": fields.text("img_path"), "conversations": turns(chance.question(), fields.plain("caption"))}


DATASET = PublicSet(
    "caption",
    keys("a record of caption", "img_path", "caption"),
    _item,
    template="<image>\nDescribe the image in one sentence.",
    placeholders=("<image>",),
)
