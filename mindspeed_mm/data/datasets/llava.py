"""LLaVA's data format: a JSON list or JSONL of {"id", "image", "conversations": [{"from", "value"}, ...]}.

`image` is a name, a list of names, or absent for a text-only record.
"""

from functools import partial
from typing import Any

from mindspeed_mm.data.conversation import conversation_turns, record_images
from mindspeed_mm.data.datasets._files import FileRecords, Parsed, ReadOptions
from mindspeed_mm.data.keys import LLAVA_TURN, keys, unused_of_turns

RECORD = keys("a record", "id", "image", "images", "conversations")


def parse(record: dict[str, Any], options: ReadOptions) -> Parsed:
    """Turns and image names of a record. Raises DataError for a broken one."""
    turns, images = conversation_turns(record, images_first=options.images_first), record_images(record)
    ignored = RECORD.unused(record, "", options.unknown_keys)
    ignored += unused_of_turns(record["conversations"], LLAVA_TURN, "conversations", options.unknown_keys)
    return Parsed(turns, images, ignored=tuple(ignored))


DATASET = partial(FileRecords, parse=parse)
