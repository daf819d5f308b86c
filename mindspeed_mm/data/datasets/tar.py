"""Tar shards in WebDataset's layout: members that share a name up to the first dot are one sample.

`data_path` is a .tar file, a folder of them, a pattern with * and [0-9], or an `s3://` address of these. A sample has
one image and either a text (.txt, .caption: the answer of a caption template) or a record (.json in LLaVA's format, or
with a "caption"); a .json beside a text is taken for metadata. The places of all members are indexed, so shards are
read at random like any other file, and resuming is exact.
"""

from __future__ import annotations

import glob
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_mm.config.load import parse_json
from mindspeed_mm.constants import IMAGE_TOKEN
from mindspeed_mm.data.captions import blip_caption
from mindspeed_mm.data.config import BasicParameters
from mindspeed_mm.data.conversation import TURNS, checked_text, conversation_turns, count_images, literal_turn, shown
from mindspeed_mm.data.datasets._files import ReadOptions
from mindspeed_mm.data.facts import facts_of_all, sample_facts
from mindspeed_mm.data.index import Index
from mindspeed_mm.data.keys import LLAVA_TURN, MEDIA, keys, unused_of_turns
from mindspeed_mm.data.media_marks import unfilled_marks
from mindspeed_mm.data.parallel import ordered
from mindspeed_mm.data.progress import progress_bar
from mindspeed_mm.data.record_starts import MAX_RECORD_BYTES
from mindspeed_mm.data.sample import ImageMember, Sample, Turn
from mindspeed_mm.data.storage.objects import is_address, local_files
from mindspeed_mm.errors import DataError

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
TEXTS = ("txt", "caption")
RECORDS = ("json",)
OTHER_MEDIA = ("mp4", "avi", "mkv", "mov", "webm", "wav", "mp3", "flac", "ogg", "m4a")
KEYS = keys("a record", "id", "caption", "image", "conversations", has_image=True)
COLUMNS = 5
"""Values of a sample in the index: place and size of the image, place and size of the text, 1 where that is a
record."""

MAX_IMAGE_BYTES = 512 * 2**20
CAPTION = '{"caption": "A cat on a mat."}'


class Shard:
    """The samples of one tar file. Safe to use from several processes; can be pickled."""

    def __init__(self, path: Path, options: ReadOptions):
        """Find the members. Raises DataError for a file that is no tar, or samples that are not whole."""
        self.path = path
        self._images_first = options.images_first
        self._unknown_keys = options.unknown_keys
        self._descriptor: int | None = None
        index = Index(path, options.index_folder, {"format": __name__})
        self.is_stored = index.stores
        self._places = index.array("members", np.int64, self._index).reshape(-1, COLUMNS)

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)

    def _index(self) -> np.ndarray:
        rows: list[int] = []
        for number, (name, members) in enumerate(self._groups()):
            image, text, is_record = self._pair(f"{self.path}: record {number} ({name})", members)
            rows += [image.offset_data, image.size, text.offset_data, text.size, int(is_record)]
        if not rows:
            raise DataError(f"{self.path} holds no samples; expected images with .txt or .json members.")
        return np.asarray(rows, dtype=np.int64)

    @staticmethod
    def _pair(where: str, members: dict[str, tarfile.TarInfo]) -> tuple[tarfile.TarInfo, tarfile.TarInfo, bool]:
        """The image and the text of a sample, and whether the text is a record."""
        images = [member for suffix, member in members.items() if suffix in IMAGES]
        texts = [member for suffix, member in members.items() if suffix in TEXTS]
        records = [member for suffix, member in members.items() if suffix in RECORDS]
        # img2dataset writes a .json of metadata beside each caption.
        is_record = not texts
        texts = texts or records
        other = [suffix for suffix in members if suffix in OTHER_MEDIA]
        if other:
            raise DataError(
                f"{where} has a .{other[0]}: {MEDIA}. Expected one image and one .txt, .caption or .json of the same "
                "name; write shards without videos and audio."
            )
        if len(images) != 1 or len(texts) != 1:
            raise DataError(
                f"{where} has {len(images)} images and {len(texts)} texts ({', '.join(members)}); expected one image "
                "and one .txt, .caption or .json of the same name, next to each other, such as 000001.jpg, 000001.txt."
            )
        image, text = images[0], texts[0]
        if image.size > MAX_IMAGE_BYTES or text.size > MAX_RECORD_BYTES:
            raise DataError(
                f"{where} has {image.size} bytes of image and {text.size} of text; no sample is that large."
            )
        return image, text, is_record

    def _groups(self) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
        """(name, members by suffix) of runs of members with one name."""
        current, members = None, {}
        try:
            with tarfile.open(self.path, "r:") as archive:
                for member in archive:
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
                    if suffix.lower() in members:
                        raise DataError(
                            f"{self.path}: {member.name} is there twice in one sample, and one of them would not be "
                            "used. Give each sample a name of its own, or write the shard again."
                        )
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

    def __getitem__(self, number: int) -> Sample:
        where = f"{self.path}: record {number}"
        image_place, image_size, text_place, text_size, is_record = self._places[number].tolist()
        try:
            text = self._read(text_place, text_size).decode("utf-8")
            record = parse_json(text) if is_record else {"caption": text.strip()}
            if not isinstance(record, dict):
                raise DataError(f"the .json is {shown(text)}; expected an object, such as {CAPTION}.")
            identity = where if record.get("id") is None else checked_text(str(record["id"]), "id")
            ignored = KEYS.unused(record, "", self._unknown_keys)
            if "conversations" in record:
                turns = conversation_turns(record, images_first=self._images_first)
                ignored += unused_of_turns(record["conversations"], LLAVA_TURN, "conversations", self._unknown_keys)
                ignored += unfilled_marks(turns, self._unknown_keys)
            elif "caption" in record:
                caption = checked_text(record["caption"], "caption")
                turns = (Turn("human", IMAGE_TOKEN), literal_turn("gpt", caption))
            else:
                raise DataError(f'the .json has no "conversations" and no "caption"; expected such as {CAPTION}.')
            if count_images(turns) != 1:
                raise DataError(
                    f'"conversations" holds {count_images(turns)} <image> placeholders; expected one, as in {TURNS}.'
                )
        except DataError as error:
            raise type(error)(f"{where}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: the text cannot be read ({error}); expected UTF-8, and in .json such as {CAPTION}."
            ) from error
        image = ImageMember(f"{where}: image", self.path, image_place, image_size)
        return Sample(identity, turns, (image,), where, ignored=tuple(ignored))


class TarShards:
    """The shards of `data_path` one after the other."""

    def __init__(self, parameters: BasicParameters, options: ReadOptions):
        """Raises DataError where there is no shard, or one that cannot be used."""
        paths, given = _shards(parameters.data_path), parameters.data_path
        if not paths:
            raise DataError(f"no tar files at {given}; expected a .tar file, a folder of them, or a pattern.")
        self._shards = _open_all(paths, options)
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        self._template = options.template
        self._processes = parameters.caption_processor is not None
        # What is known of all samples is kept under the first shard; the key names the others.
        sizes = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        key = {"shards": sizes, "template": options.template.digest, "images_first": options.images_first}
        key["unknown_keys"] = options.unknown_keys
        key |= {"captions": parameters.caption_processor} if self._processes else {}
        self.index = Index(paths[0], options.index_folder, key)
        if options.problems is None:
            self.facts = facts_of_all(self, parameters.data_path)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Sample:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        sample = self._shards[shard][number - (int(self._ends[shard - 1]) if shard else 0)]
        if not self._processes or sample.turns[0].text != IMAGE_TOKEN:  # a conversation
            return sample
        return replace(sample, turns=(sample.turns[0], literal_turn("gpt", blip_caption(sample.turns[1].text))))

    def look(self, number: int) -> tuple[int, ...]:
        """Everything that can be wrong with a sample's text, found once; returns its facts."""
        sample = self[number]
        try:
            return sample_facts(sample, self._template)
        except DataError as error:
            raise type(error)(f"{sample.where}: {error}") from error


def _shards(given: str) -> list[Path]:
    """The tar files that a path, a folder, a pattern or an address of these names, sorted."""
    if is_address(given):
        return local_files(given if given.endswith(".tar") else given.rstrip("/") + "/*.tar")
    pattern = str(Path(given) / "*.tar") if os.path.isdir(given) else given
    return sorted(Path(path) for path in glob.glob(pattern))


def _open_all(paths: Sequence[Path], options: ReadOptions) -> list[Shard]:
    """All shards, indexed by all cores. Raises the first DataError."""

    def opened(numbers: range) -> Shard | DataError | None:
        try:
            shard = Shard(paths[numbers[0]], options)
        except DataError as error:
            error.__cause__ = error.__context__ = None  # may not survive pickling
            return error
        return None if shard.is_stored else shard  # what is stored is mapped by the process that uses it

    shards: list[Shard] = []
    with (
        progress_bar(f"indexing {len(paths)} tar files", len(paths)) as advance,
        ordered(opened, len(paths), alone_below=2, chunk=1) as parts,
    ):
        for path, shard in zip(paths, parts, strict=True):
            if isinstance(shard, DataError):
                raise shard
            shards.append(shard or Shard(path, options))
            advance(1)
    return shards


DATASET = TarShards
