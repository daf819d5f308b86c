"""Tar shards in WebDataset's layout: members that share a name up to the first dot are one sample.

`data_path` is a .tar file, a folder of them, or a pattern with * and [0-9]. A sample has one image and either a text
(.txt, .caption: the answer of a caption template) or a record (.json in LLaVA's format, or with a "caption"). The
places of all members are indexed, so shards are read at random like any other file, and resuming is exact.
"""

from __future__ import annotations

import glob
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_mm.constants import IMAGE_TOKEN
from mindspeed_mm.data.config import BasicParameters
from mindspeed_mm.data.conversation import checked_text, conversation_turns, count_images, literal_turn
from mindspeed_mm.data.datasets._files import ReadOptions
from mindspeed_mm.data.index import Index
from mindspeed_mm.data.progress import progress_bar
from mindspeed_mm.data.records import MAX_RECORD_BYTES
from mindspeed_mm.data.sample import ImageBytes, Sample, Turn
from mindspeed_mm.data.template import render_turns
from mindspeed_mm.errors import DataError

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
TEXTS = ("txt", "caption")
RECORDS = ("json",)
COLUMNS = 5
"""Values of a sample in the index: place and size of the image, place and size of the text, 1 where that is a
record."""

MAX_IMAGE_BYTES = 512 * 2**20


class Shard:
    """The samples of one tar file. Safe to use from several processes; can be pickled."""

    def __init__(self, path: Path, options: ReadOptions):
        self.path = path
        self._options = options
        self._descriptor: int | None = None
        key = {"format": __name__, "images_first": options.images_first, "template": options.template.digest}
        self.index = Index(path, options.index_folder, key)
        self._places = self.index.array("members", np.int64, self._index).reshape(-1, COLUMNS)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Sample:
        places = self._places[number].tolist()
        return self._sample(places, f"{self.path}: record {number}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)

    def _index(self) -> np.ndarray:
        rows: list[int] = []
        with progress_bar(f"indexing {self.path.name}", self.path.stat().st_size) as advance:
            for number, (name, members) in enumerate(self._groups(advance)):
                where = f"{self.path}: record {number} ({name})"
                images = [member for suffix, member in members.items() if suffix in IMAGES]
                texts = [(suffix, member) for suffix, member in members.items() if suffix in TEXTS + RECORDS]
                if len(images) != 1 or len(texts) != 1:
                    raise DataError(
                        f"{where} has {len(images)} images and {len(texts)} texts ({', '.join(members)}); expected one "
                        "image and one .txt, .caption or .json of the same name, next to each other."
                    )
                (suffix, text), image = texts[0], images[0]
                self._bound(where, image, text)
                row = [image.offset_data, image.size, text.offset_data, text.size, int(suffix in RECORDS)]
                sample = self._sample(row, where)
                try:
                    render_turns(sample.turns, self._options.template)
                except DataError as error:
                    raise type(error)(f"{where}: {error}") from error
                rows += row
        if not rows:
            raise DataError(f"{self.path} holds no samples; expected images with .txt or .json members.")
        return np.asarray(rows, dtype=np.int64)

    def _bound(self, where: str, image: tarfile.TarInfo, text: tarfile.TarInfo) -> None:
        if image.size > MAX_IMAGE_BYTES or text.size > MAX_RECORD_BYTES:
            raise DataError(
                f"{where} has {image.size} bytes of image and {text.size} of text; no sample is that large."
            )

    def _groups(self, advance) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
        """(name, members by suffix) of runs of members with one name."""
        current, members, last = None, {}, 0
        try:
            with tarfile.open(self.path, "r:") as archive:
                for member in archive:
                    advance(member.offset_data + member.size - last)
                    last = member.offset_data + member.size
                    archive.members = []  # tarfile would keep them all
                    folder, base = os.path.split(member.name)
                    stem, _, suffix = base.partition(".")
                    if not member.isfile() or not stem:
                        continue
                    name = os.path.join(folder, stem)
                    if name != current and members:
                        yield str(current), members
                        members = {}
                    current = name
                    members[suffix.lower()] = member
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(f"{self.path} cannot be read ({error}); expected an uncompressed tar file.") from error
        if members:
            yield str(current), members

    def _read(self, place: int, size: int) -> bytes:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        content = os.pread(self._descriptor, size, place)
        if len(content) != size:
            raise DataError(f"{self.path} ends within a member; the file has changed since it was indexed.")
        return content

    def _sample(self, places: list[int], where: str) -> Sample:
        image_place, image_size, text_place, text_size, is_record = places
        try:
            text = self._read(text_place, text_size).decode("utf-8")
            record = json.loads(text) if is_record else {"caption": text.strip()}
            if not isinstance(record, dict):
                raise DataError(f"the .json is {text[:80]!r}; expected an object.")
            if "conversations" in record:
                turns = conversation_turns(record, images_first=self._options.images_first)
            else:
                caption = checked_text(record.get("caption"), "caption")
                turns = (Turn("human", IMAGE_TOKEN), literal_turn("gpt", caption))
            if count_images(turns) != 1:
                raise DataError(f"the conversation has {count_images(turns)} <image> placeholders; expected one.")
        except DataError as error:
            raise type(error)(f"{where}: {error}") from error
        except ValueError as error:
            raise DataError(
                f"{where}: the text cannot be read ({error}); expected UTF-8, and JSON in .json."
            ) from error
        picture = ImageBytes(f"{where}: image", self._read(image_place, image_size))
        return Sample(str(record.get("id", where)), turns, (picture,), where)


class TarShards:
    """The shards of `data_path` one after the other."""

    def __init__(self, parameters: BasicParameters, options: ReadOptions):
        """Raises DataError where there is no shard, or one that cannot be used."""
        given = Path(parameters.data_path)
        pattern = str(given / "*.tar") if given.is_dir() else str(given)
        paths = sorted(Path(path) for path in glob.glob(pattern))
        if not paths:
            raise DataError(f"no tar files at {given}; expected a .tar file, a folder of them, or a pattern.")
        self._shards = [Shard(path, options) for path in paths]
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        # Lengths of all samples are kept under the first shard; the key names the others.
        sizes = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        key = {"shards": sizes, "template": options.template.digest}
        self.index = Index(paths[0], options.index_folder, key)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Sample:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return self._shards[shard][number - (int(self._ends[shard - 1]) if shard else 0)]


DATASET = TarShards
