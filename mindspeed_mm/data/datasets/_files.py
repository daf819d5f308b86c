"""What the kinds of data files share: records found by number, checked, with images inside the data folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mindspeed_mm.data.config import BasicParameters
from mindspeed_mm.data.conversation import count_images
from mindspeed_mm.data.index import Index
from mindspeed_mm.data.parquet import ParquetFile
from mindspeed_mm.data.records import RecordFile
from mindspeed_mm.data.sample import ImageBytes, Sample, Turn
from mindspeed_mm.data.template import Template, render_turns
from mindspeed_mm.errors import DataError


@dataclass(frozen=True)
class ReadOptions:
    """What is asked of every kind of data file."""

    template: Template
    """Records that it cannot render are refused."""

    index_folder: Path | None = None
    """Where indexes of large files are stored; None: nowhere."""

    images_first: bool = True
    """LLaVA's clean-up: an `<image>` moves to the front of its turn. For LLaVA's own format only."""

    problems: list[DataError] | None = None
    """Check-data: records are not checked when the file is indexed; damage of the file itself is put here, and the
    records around it are read."""


class Parsed(NamedTuple):
    """A record's content, its format understood."""

    turns: tuple[Turn, ...]
    images: Sequence[str | ImageBytes]
    """Names relative to the data folder, or encoded pictures, in reading order."""

    rejected: tuple[Turn, ...] | None = None


Parser = Callable[[dict[str, Any], ReadOptions], Parsed]


class FileRecords:
    """The samples of one JSON, JSONL or parquet file, read on demand; images are not opened.

    All records are checked when the file's index is built.
    """

    def __init__(self, parameters: BasicParameters, options: ReadOptions, parse: Parser):
        """`parse` knows the format. Raises DataError naming file and record for the first that cannot be used."""
        self._folder = os.path.abspath(parameters.data_folder)
        self._shown_folder = parameters.data_folder
        self._options = options
        self._parse = parse
        key = {"format": parse.__module__, "images_first": options.images_first, "folder": parameters.data_folder}
        self.index = Index(parameters.data_path, options.index_folder, key | {"template": options.template.digest})
        kind = ParquetFile if parameters.data_path.endswith(".parquet") else RecordFile
        check = self._checked if options.problems is None else None
        self.records = kind(parameters.data_path, check=check, index=self.index, problems=options.problems)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> Sample:
        return self._sample(self.records[number], self.records.where(number))

    def _checked(self, record: dict[str, Any], where: str) -> None:
        """Everything that can be wrong with a record, found once, when the file is indexed."""
        sample = self._sample(record, where)
        try:
            render_turns(sample.turns, self._options.template)
        except DataError as error:
            raise type(error)(f"{sample.where}: {error}") from error

    def _sample(self, record: dict[str, Any], where: str) -> Sample:
        identity = record.get("id")
        named = where if identity is None else f"{where} (id {identity})"
        try:
            turns, images, rejected = self._parse(record, self._options)
            found = count_images(turns)
            if found != len(images):
                raise DataError(
                    f'"conversations" holds {found} <image> placeholders (several in one turn count once, unless '
                    f'"image" is a list), but "image" names {len(images)}; expected one placeholder per image. Correct '
                    "the record."
                )
            paths = tuple(self._inside_folder(image) for image in images)
        except DataError as error:
            raise type(error)(f"{named}: {error}") from error
        return Sample(str(where if identity is None else identity), turns, paths, named, rejected)

    def _inside_folder(self, name: str | ImageBytes) -> Path | ImageBytes:
        """The path of an image, which may not leave the data folder (links inside it may, they are the user's own)."""
        if isinstance(name, ImageBytes):
            return name
        path = os.path.normpath(os.path.join(self._folder, name))
        if not path.startswith(os.path.join(self._folder, "")):
            raise DataError(
                f'"image" is {name!r}, which lies outside data_folder {self._shown_folder!r}; expected a path inside '
                'it, such as "coco/train2017/000000000009.jpg".'
            )
        return Path(path)
