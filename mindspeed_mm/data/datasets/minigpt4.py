"""MiniGPT-4's records: captions {"image_id", "caption"}, and turns {"image", "instruction_input", "answer"}.

An image without "image" is `<image_id>.jpg`. A caption's question is one of four, chosen by the image_id, so that every
run asks the same. `<Img><ImageHere></Img>` in an instruction stands for the image; without it, the image comes first.
"""

import re
import zlib
from functools import partial
from typing import Any

from mindspeed_mm.config.minigpt4_model import QUESTIONS
from mindspeed_mm.constants import IMAGE_TOKEN
from mindspeed_mm.data.conversation import checked_text
from mindspeed_mm.data.datasets._files import FileRecords, Parsed, ReadOptions
from mindspeed_mm.data.keys import keys
from mindspeed_mm.data.sample import Turn
from mindspeed_mm.errors import DataError

RECORD = keys("a record", "id", "image", "image_id", "caption", "instruction_input", "answer")
PLACE = re.compile(r"\s*(<Img>)?<ImageHere>(</Img>)?\s*")
EXAMPLE = (
    '{"image_id": "2", "caption": "A cat."} or {"image": "2.jpg", "instruction_input": "What?", "answer": "A cat."}'
)


def parse(record: dict[str, Any], options: ReadOptions) -> Parsed:
    """Turns and the image of a record. Raises DataError for a broken one."""
    is_caption = isinstance(record, dict) and "caption" in record
    wanted = {"caption"} if is_caption else {"instruction_input", "answer"}
    if not isinstance(record, dict) or not wanted <= set(record) or not {"image", "image_id"} & set(record):
        raise DataError(f"is {record!r:.80}; expected a record such as {EXAMPLE}.")
    identity = str(record.get("image_id", record.get("image")))
    image = checked_text(record.get("image", f"{identity}.jpg"), "image")
    if is_caption:
        question, answer = QUESTIONS[zlib.crc32(identity.encode()) % len(QUESTIONS)], record["caption"]
    else:
        question, answer = checked_text(record["instruction_input"], "instruction_input"), record["answer"]
        found = question.count("<ImageHere>")
        if found > 1:
            raise DataError(
                f'"instruction_input" holds {found} <ImageHere>, and the record has one image; expected at most one. '
                "Correct the record."
            )
        question = PLACE.sub(" ", question).strip()
    turns = (Turn("human", f"{IMAGE_TOKEN}\n{question}"), Turn("gpt", checked_text(answer, "answer")))
    return Parsed(turns, (image,), ignored=tuple(RECORD.unused(record, "", options.unknown_keys)))


DATASET = partial(FileRecords, parse=parse)
