"""What the kinds of data files share: records found by number, checked, with images inside the data folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mindspeed_mm.data.config import BasicParameters
from mindspeed_mm.data.conversation import EXAMPLE, checked_text, count_images, shown
from mindspeed_mm.data.facts import facts_of_all, sample_facts
from mindspeed_mm.data.grounding.geometry import BoxStep
from mindspeed_mm.data.index import Index
from mindspeed_mm.data.media_marks import unfilled_marks
from mindspeed_mm.data.parquet import ParquetFile
from mindspeed_mm.data.records import RecordFile
from mindspeed_mm.data.sample import EncodedImage, Sample, Turn, VideoFrames
from mindspeed_mm.data.storage.objects import absolute_folder, inside, is_address, local_file
from mindspeed_mm.data.template_form import Template
from mindspeed_mm.errors import DataError, UnknownKeyError

NAME = '"coco/train2017/000000000009.jpg"'
PLAIN_NAME = re.compile(r"(?:[\w-][\w.-]*/)*[\w-][\w.-]*", re.ASCII)
"""A name that surely stays in its folder, as nearly all do; the others are looked at closely."""


@dataclass(frozen=True)
class ReadOptions:
    """What is asked of every kind of data file."""

    template: Template
    """Records that it cannot render are refused."""

    index_folder: Path | None = None
    """Where indexes of large files are stored; None: nowhere."""

    images_first: bool = True
    """LLaVA's clean-up: an `<image>` moves to the front of its turn. For LLaVA's own format only."""

    unknown_keys: str = "error"
    """See DatasetParam.unknown_keys."""

    problems: list[DataError] | None = None
    """Check-data: records are not checked when the file is indexed; damage of the file itself is put here, and the
    records around it are read."""

    image_steps: tuple[BoxStep, ...] = ()
    """What moves boxes on the way from a stored image to the model's, for formats with boxes."""


class Parsed(NamedTuple):
    """A record's content, its format understood."""

    turns: tuple[Turn, ...]
    images: Sequence[str | EncodedImage | VideoFrames]
    """Names relative to the data folder, or encoded images, in reading order."""

    rejected: tuple[Turn, ...] | None = None
    ignored: tuple[str, ...] = ()
    """Keys that nothing reads."""


Parser = Callable[[dict[str, Any], ReadOptions], Parsed]


class FileRecords:
    """The samples of one JSON, JSONL or parquet file, read on demand; images are not opened.

    All records are checked when the file is seen for the first time, and `facts` are kept of them.
    """

    def __init__(
        self,
        parameters: BasicParameters,
        options: ReadOptions,
        parse: Parser,
        pairs: bool = False,
        reader: Callable[..., Any] | None = None,
        key: dict[str, Any] | None = None,
        lines: bool = False,
    ):
        """`parse` knows the format, `pairs` says that its records have a rejected answer. `reader` opens a file of
        another form than RecordFile's, and `key` says what its records depend on besides the file. With `lines`, every
        message names the line. Raises DataError naming file and record for the first that cannot be used."""
        given, self.pairs = parameters.data_path, pairs
        path = str(local_file(given))
        self.videos = False
        """Whether images of its records may be VideoFrames."""
        self._folder = absolute_folder(parameters.data_folder)
        self._shown_folder = parameters.data_folder
        self._options = options
        self._parse, self._lines = parse, lines
        is_parquet = path.endswith(".parquet")
        # Where records are depends on the file alone; whether they can be used depends on more.
        # What is found of a damaged file is not stored.
        places = Index(path, options.index_folder if is_parquet or options.problems is None else None)
        open_file = reader or (ParquetFile if is_parquet else RecordFile)
        self.records = open_file(given, index=places, problems=options.problems)
        key = {"format": parse.__module__} if key is None else key
        key = {"images_first": options.images_first, "folder": parameters.data_folder} | key
        key |= {"template": options.template.digest, "unknown_keys": options.unknown_keys}
        self.index = Index(path, options.index_folder, key)
        if options.problems is None:
            self.facts = facts_of_all(self, given)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> Sample:
        read = self.records.__getitem__ if self._options.problems is None else self.records.verified
        return self._sample(read(number), number)

    def look(self, number: int) -> tuple[int, ...]:
        """Everything that can be wrong with a record, found once; returns its facts."""
        sample = self._sample(self.records.verified(number), number)
        try:
            return sample_facts(sample, self._options.template)
        except DataError as error:
            raise type(error)(f"{sample.where}: {error}") from error

    def _sample(self, record: dict[str, Any], number: int) -> Sample:
        where = self.records.where(number)
        identity = record.get("id")
        if identity is not None:
            identity = str(identity)
            where = f"{where} (id {identity})" if identity.isprintable() else where
        try:
            if identity is not None:
                checked_text(identity, "id")
            turns, images, rejected, ignored = self._parse(record, self._options)
            ignored = (*ignored, *unfilled_marks(turns, self._options.unknown_keys))
            found = count_images(turns)
            if found != len(images):
                raise DataError(
                    f'"conversations" holds {found} <image> placeholders (several in one turn count once, unless '
                    f'"image" is a list), but "image" names {len(images)}; expected one placeholder per image, as in '
                    f"{EXAMPLE}. Correct the record."
                )
            paths = tuple(self._inside_folder(image) for image in images)
        except DataError as error:
            line = getattr(self.records, "line", None)  # of parquet there are none
            if (self._lines or isinstance(error, UnknownKeyError)) and line is not None:
                where = f"{where}, line {line(number)}"
            raise type(error)(f"{where}: {error}") from error
        return Sample(where if identity is None else identity, turns, paths, where, rejected, ignored)

    def _inside_folder(self, name: str | EncodedImage | VideoFrames) -> str | EncodedImage | VideoFrames:
        """The path of an image, which may not leave the data folder (links inside it may, they are the user's own)."""
        if not isinstance(name, str):
            return name
        if is_address(self._folder):
            return self._in_store(name)
        if PLAIN_NAME.fullmatch(name):
            return f"{self._folder}/{name}"
        if "\0" in checked_text(name, "image"):
            raise DataError(f'"image" is {shown(name)}, with a NUL character; expected a name such as {NAME}.')
        path = os.path.normpath(os.path.join(self._folder, name))
        if not path.startswith(os.path.join(self._folder, "")):
            raise DataError(
                f'"image" is {name!r}, which lies outside data_folder {self._shown_folder!r}; expected a path inside '
                f"it, such as {NAME}."
            )
        return path

    def _in_store(self, name: str) -> EncodedImage:
        """The image behind an address, which may not leave the data folder either."""
        image = inside(self._folder, checked_text(name, "image"))
        if image is None:
            raise DataError(
                f'"image" is {shown(name)}, which lies outside data_folder {self._shown_folder!r}; expected a name '
                f"inside it, such as {NAME}."
            )
        return image
