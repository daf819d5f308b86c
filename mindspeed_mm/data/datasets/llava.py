"""LLaVA's data format: a JSON list or JSONL of {"id", "image", "conversations": [{"from", "value"}, ...]}.

`image` is a name, a list of names, or absent for a text-only record.
"""

import os
from pathlib import Path
from typing import Any

from mindspeed_mm.data.config import BasicParameters
from mindspeed_mm.data.conversation import conversation_turns, count_images, record_images
from mindspeed_mm.data.records import RecordFile
from mindspeed_mm.data.sample import Sample
from mindspeed_mm.data.template import Template, render_turns
from mindspeed_mm.errors import DataError


class LlavaRecords:
    """The samples of one data file, read on demand. All records are checked when it is made; images are not opened."""

    def __init__(self, parameters: BasicParameters, template: Template):
        """Raises DataError naming file and record for the first record that cannot be used."""
        self._folder = parameters.data_folder
        self._template = template
        self._records = RecordFile(parameters.data_path, check=self._sample)
        count = len(self._records)
        self._length = int(count * parameters.repeat_time)
        if not self._length:
            raise DataError(
                f"{parameters.data_path}: a share of {parameters.repeat_time} of {count} records is none; raise "
                "repeat_time."
            )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        number = index % len(self._records)
        return self._sample(self._records[number], self._records.where(number))

    def _sample(self, record: dict[str, Any], where: str) -> Sample:
        identity = record.get("id")
        named = where if identity is None else f"{where} (id {identity})"
        try:
            turns = conversation_turns(record)
            names = record_images(record)
            found = count_images(turns)
            if found != len(names):
                raise DataError(
                    f'"conversations" holds {found} <image> placeholders (several in one turn count once, unless '
                    f'"image" is a list), but "image" names {len(names)}; expected one placeholder per image. Correct '
                    "the record."
                )
            images = tuple(self._inside_folder(name) for name in names)
            render_turns(turns, self._template)
        except DataError as error:
            raise type(error)(f"{named}: {error}") from error
        return Sample(str(where if identity is None else identity), turns, images, named)

    def _inside_folder(self, name: str) -> Path:
        """The path of an image, which may not leave the data folder (links inside it may, they are the user's own)."""
        folder = os.path.abspath(self._folder)
        path = os.path.abspath(os.path.join(folder, name))
        if os.path.commonpath([folder, path]) != folder:
            raise DataError(
                f'"image" is {name!r}, which lies outside data_folder {self._folder!r}; expected a path inside it.'
            )
        return Path(path)


DATASET = LlavaRecords
