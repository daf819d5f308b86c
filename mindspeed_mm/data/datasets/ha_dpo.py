"""HA-DPO's preference files over Visual Genome's images.

desc_data.json has several good and bad descriptions of each image: {image_id: {"chosen": [..], "rejected": [..]}}, or a
list of such objects with their "image_id". One of each and one of four questions are drawn once, from `sampling_seed`
and the image's id, whatever the order of the file. pope_data.json is a list of {"image_id", "question", "chosen",
"reject" or "rejected", "answer", "correct"}; rows whose "correct" is true hold no error to learn from and are left out,
as HA-DPO does for LLaVA and InstructBLIP. With `hadpo_model` "minigpt4" they stay, and descriptions lose their line
feeds, as those of "instructblip" do. The file of an image is found through Visual Genome's image_data.json.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mindspeed_mm.config.load import parse_json
from mindspeed_mm.config.minigpt4_model import QUESTIONS
from mindspeed_mm.data.config import BasicParameters
from mindspeed_mm.data.conversation import checked_text, shown
from mindspeed_mm.data.datasets import preference
from mindspeed_mm.data.datasets._files import FileRecords, Parsed, ReadOptions
from mindspeed_mm.data.index import Index
from mindspeed_mm.data.keys import keys
from mindspeed_mm.data.storage.objects import local_file
from mindspeed_mm.errors import DataError

logger = logging.getLogger(__name__)

IMAGE_DATA = "image_data.json"
SIDES = ("chosen", "rejected", "reject")
KEYS = keys("a row of ha_dpo", "image_id", "question", "answer", "correct", *SIDES)
SAMPLING_SEED = 42
"""HA-DPO's. Its draws depend on the order of the file, ours on the image."""

DESCRIPTION = '{"image_id": 2325435, "chosen": ["A dog runs."], "rejected": ["A dog and a cat run."]}'
QUESTION = '{"image_id": 2325435, "question": "Is there a cat?", "chosen": "No.", "reject": "Yes.", "correct": false}'


class HaDpoFile:
    """The rows of one file, each with the preference record made of it (see preference.py). They are few enough to be
    held in memory."""

    def __init__(
        self,
        path: str | Path,
        *,
        index: Index | None = None,
        problems: list[DataError] | None = None,
        image_data: str | Path,
        seed: int,
        model: str = "llava",
    ) -> None:
        """`index` is not needed. Raises DataError for a file that cannot be read, or for image_data."""
        self.path, self._seed, self._problems, self._model = Path(local_file(path)), seed, problems, model
        rows = list(_rows(_read(self.path, "data_path"), self.path))
        kept = [(number, row) for number, row in enumerate(rows) if model == "minigpt4" or not _is_correct(row)]
        if len(kept) < len(rows):
            logger.info('%s: %d of %d rows are "correct" and left out', path, len(rows) - len(kept), len(rows))
        if not kept:
            raise DataError(
                f"{path} holds no records to learn from; expected rows such as {DESCRIPTION} or {QUESTION}."
            )
        self._numbers = [number for number, _ in kept]
        self._rows = [row for _, row in kept]
        self._image_data = Path(local_file(image_data))
        self._files = _image_files(self._image_data, {str(_image_id(row)) for row in self._rows})

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, number: int) -> str:
        """Name of a record for messages, by its place in the file."""
        return f"{self.path}: record {self._numbers[number]}"

    def verified(self, number: int) -> dict[str, Any]:
        """As []: nothing is checked later than at the start."""
        return self[number]

    def __getitem__(self, number: int) -> dict[str, Any]:
        """{"id", "row", "record"}, the last as preference.py reads it. Raises DataError for a row of another form."""
        row = self._rows[number]
        try:
            record = self._record(row, number)
            return {"id": record["id"], "row": row, "record": record}
        except DataError as error:
            raise type(error)(f"{self.where(number)}: {error}") from error

    def _record(self, row: Any, number: int) -> dict[str, Any]:
        image_id = _image_id(row)
        if image_id is None:
            raise DataError(f"is {shown(row)}; expected an object with an image_id, such as {DESCRIPTION}.")
        name = self._files.get(str(image_id))
        if name is None:
            raise DataError(
                f"image_id {image_id} is not in {self._image_data}; expected Visual Genome's image_data.json of the "
                "same version. Correct image_data, or remove the record."
            )
        rest = {key: row[key] for key in SIDES if key in row}
        if "question" in row:
            question = checked_text(row["question"], "question")
            return rest | {"id": f"{image_id}-{self._numbers[number]}", "prompt": question, "image": name}
        draw = random.Random(f"{self._seed} {image_id}")
        drawn = {key: _drawn(row.get(key), key, draw) for key in ("chosen", "rejected")}
        if self._model != "llava":
            drawn = {key: text.replace("\n", "") for key, text in drawn.items()}
        return rest | drawn | {"id": str(image_id), "prompt": draw.choice(QUESTIONS), "image": name}


def parse(record: dict[str, Any], options: ReadOptions) -> Parsed:
    """Both conversations of a row, and its image. Raises DataError for a broken one."""
    ignored = KEYS.unused(record["row"], "", options.unknown_keys)
    return preference.parse(record["record"], options)._replace(ignored=tuple(ignored))


def _read(path: Path, key: str) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Correct {key}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}). Correct the file, or {key}.") from error


def _rows(content: Any, path: Path) -> Iterable[Any]:
    """The rows of a list, or of an object whose keys are image ids."""
    if isinstance(content, Mapping):
        return [{"image_id": key} | value if isinstance(value, Mapping) else value for key, value in content.items()]
    if not isinstance(content, list):
        raise DataError(f"{path} holds {shown(content)}; expected a list of rows such as {DESCRIPTION} or {QUESTION}.")
    return content


def _is_correct(row: Any) -> bool:
    return isinstance(row, Mapping) and row.get("correct") in (True, "true", "True")


def _image_id(row: Any) -> int | str | None:
    found = row.get("image_id") if isinstance(row, Mapping) else None
    return found if isinstance(found, int | str) and not isinstance(found, bool) else None


def _drawn(texts: Any, key: str, draw: random.Random) -> str:
    if not isinstance(texts, list) or not texts:
        raise DataError(f'"{key}" is {shown(texts)}; expected a list of descriptions, as in {DESCRIPTION}.')
    return checked_text(draw.choice(texts), key)


def _image_files(path: Path, wanted: set[str]) -> dict[str, str]:
    """Image id -> file below the folder of Visual Genome, VG_100K/1.jpg or VG_100K_2/1.jpg: the end of its URL."""
    content = _read(path, f"image_data (default: {IMAGE_DATA} in data_folder)")
    if not isinstance(content, list):
        raise DataError(f"{path} holds {shown(content)}; expected Visual Genome's list of image_id and url.")
    files = {}
    for entry in content:
        if not isinstance(entry, Mapping) or "image_id" not in entry or not isinstance(entry.get("url"), str):
            raise DataError(f'{path} has {shown(entry)}; expected {{"image_id": 1, "url": ".../VG_100K_2/1.jpg"}}.')
        identity = str(entry["image_id"])
        if identity in wanted:
            files[identity] = "/".join(entry["url"].split("/")[-2:])
    return files


def dataset(parameters: BasicParameters, options: ReadOptions) -> FileRecords:
    """The source of a data set (see _files.py)."""
    image_data = parameters.image_data or os.path.join(parameters.data_folder, IMAGE_DATA)
    seed = SAMPLING_SEED if parameters.sampling_seed is None else parameters.sampling_seed
    model = parameters.hadpo_model or "llava"
    reader = partial(HaDpoFile, image_data=image_data, seed=seed, model=model)
    key = {"format": __name__, "image_data": str(image_data), "sampling_seed": seed}
    key |= {} if model == "llava" else {"hadpo_model": model}
    return FileRecords(parameters, options, parse, pairs=True, reader=reader, key=key)


DATASET = dataset
