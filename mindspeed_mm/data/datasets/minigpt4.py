"""MiniGPT-4's records: captions {"image_id", "caption"}, and turns {"image", "instruction_input", "answer"}.

An image without "image" is `<image_id>.jpg`. A caption's question is one of four, chosen by the image_id, so that every
run asks the same. `<Img><ImageHere></Img>` in an instruction stands for the image; without it, the image comes first.
cc_sbu_align's filter_cap.json, whose records stand in a list "annotations", is read as it is.
"""

import re
import zlib
from pathlib import Path
from typing import Any

from mindspeed_mm.config.load import parse_json
from mindspeed_mm.config.minigpt4_model import QUESTIONS
from mindspeed_mm.constants import IMAGE_TOKEN
from mindspeed_mm.data.config import BasicParameters
from mindspeed_mm.data.conversation import checked_text, shown
from mindspeed_mm.data.datasets._files import FileRecords, Parsed, ReadOptions
from mindspeed_mm.data.index import Index
from mindspeed_mm.data.keys import keys
from mindspeed_mm.data.sample import Turn
from mindspeed_mm.errors import DataError

RECORD = keys("a record", "id", "image", "image_id", "caption", "instruction_input", "answer")
PLACE = re.compile(r"\s*(<Img>)?<ImageHere>(</Img>)?\s*")
ANNOTATIONS = re.compile(rb'\s*\{\s*"annotations"\s*:')
"""How filter_cap.json begins, and no line of records does."""

EXAMPLE = (
    '{"image_id": "2", "caption": "A cat."} or {"image": "2.jpg", "instruction_input": "What?", "answer": "A cat."}'
)


def parse(record: dict[str, Any], options: ReadOptions) -> Parsed:
    """Turns and the image of a record. Raises DataError for a broken one."""
    is_caption = isinstance(record, dict) and "caption" in record
    wanted = {"caption"} if is_caption else {"instruction_input", "answer"}
    if not isinstance(record, dict) or not wanted <= set(record) or not {"image", "image_id"} & set(record):
        raise DataError(f"is {record!r:.80}; expected a record such as {EXAMPLE}.")
    beside = [f'"{key}"' for key in ("instruction_input", "answer") if is_caption and key in record]
    if beside:
        raise DataError(
            f'has "caption" beside {" and ".join(beside)}: a record is a caption or an answer, and the other would not '
            f"be learned. Keep one; expected {EXAMPLE}."
        )
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


class AnnotationsFile:
    """The records of a file {"annotations": [record, ...]}. They are few (3,439) and held in memory."""

    def __init__(
        self, path: str | Path, *, index: Index | None = None, problems: list[DataError] | None = None
    ) -> None:
        """Neither `index` nor `problems` is needed. Raises DataError for a file that cannot be read so."""
        self.path = Path(path)
        try:
            content = parse_json(self.path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not JSON ({error}); copy it again.") from error
        self._rows = content["annotations"]
        if not isinstance(self._rows, list) or not self._rows:
            raise DataError(f'{path}: "annotations" is {shown(self._rows)}; expected a list of records, as {EXAMPLE}.')

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, number: int) -> str:
        """Name of a record for messages."""
        return f"{self.path}: record {number} of its annotations"

    def __getitem__(self, number: int) -> Any:
        return self._rows[number]

    def verified(self, number: int) -> dict[str, Any]:
        """A record that is read for the first time. Raises DataError for what is no object."""
        if not isinstance(self._rows[number], dict):
            raise DataError(f"{self.where(number)} is {shown(self._rows[number])}; expected an object, as {EXAMPLE}.")
        return self._rows[number]


def dataset(parameters: BasicParameters, options: ReadOptions) -> FileRecords:
    """The source of a data set (see _files.py)."""
    return FileRecords(parameters, options, parse, reader=_reader(Path(parameters.data_path)))


def _reader(path: Path) -> type[AnnotationsFile] | None:
    """What opens the file; None: whatever opens others of its name."""
    try:
        with path.open("rb") as file:
            return AnnotationsFile if ANNOTATIONS.match(file.read(1024).removeprefix(b"\xef\xbb\xbf")) else None
    except OSError:  # told by the reader of all files, with what is expected
        return None


DATASET = dataset
