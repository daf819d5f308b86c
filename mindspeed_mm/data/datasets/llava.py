"""LLaVA's data format: a JSON list or JSONL of {"id", "image", "conversations": [{"from", "value"}, ...]}.

`image` is a name, a list of names, or absent for a text-only record.
"""

from functools import partial
from typing import Any

from mindspeed_mm.data.conversation import conversation_turns, record_images
from mindspeed_mm.data.datasets._files import FileRecords, Parsed, ReadOptions


def parse(record: dict[str, Any], options: ReadOptions) -> Parsed:
    """Turns and image names of a record. Raises DataError for a broken one."""
    return Parsed(conversation_turns(record, images_first=options.images_first), record_images(record))


DATASET = partial(FileRecords, parse=parse)
