"""Grounding items, JSON or JSONL: {"image", "target": {"boxes", "points"}, "conversations"} (data/grounding/item.py).

The boxes of a record are pixels of the image as it is stored; they are written as fractions of the image as the model
sees it, so padding to a square and CLIP's crop count. Sizes come from target.width and target.height, else from the
header of the image.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from mindspeed_mm.data.config import BasicParameters
from mindspeed_mm.data.datasets._files import FileRecords, Parsed, ReadOptions
from mindspeed_mm.data.grounding.fill import written_turns
from mindspeed_mm.data.grounding.item import read_item
from mindspeed_mm.data.grounding.notation import Notation
from mindspeed_mm.data.grounding.parameters import GroundingParameters
from mindspeed_mm.data.image import image_size
from mindspeed_mm.data.storage.objects import absolute_folder, in_folder


def parse(
    record: dict[str, Any], options: ReadOptions, *, folder: str, style: Notation, normalised: bool = False
) -> Parsed:
    """Turns with their boxes written, and the images, of a record. Raises DataError for a broken one."""
    item = read_item(record, normalised=normalised, unknown_keys=options.unknown_keys)

    def size_of(number: int) -> tuple[int, int]:
        height, width = image_size(in_folder(folder, item.images[number]))
        return width, height

    turns = written_turns(item, style, size_of, options.image_steps, normalised=normalised)
    return Parsed(turns, item.shown, ignored=item.ignored)


def dataset(parameters: BasicParameters, options: ReadOptions) -> FileRecords:
    """The source of a data set (see _files.py)."""
    grounding = parameters.grounding or GroundingParameters()
    grounding.refuse_unused("grounding", ())
    folder = absolute_folder(parameters.data_folder)
    reads = partial(parse, folder=folder, style=grounding.style, normalised=grounding.normalised)
    key = {"format": __name__, "steps": [repr(step) for step in options.image_steps]} | asdict(grounding.style)
    return FileRecords(parameters, options, reads, key=key | {"normalised": grounding.normalised}, lines=True)


DATASET = dataset
