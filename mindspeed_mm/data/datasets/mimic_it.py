"""Otter's instructions (MIMIC-IT): {"meta": .., "data": {id: {"instruction", "answer", "image_ids", "rel_ins_ids"}}}.

Images are base64 texts in a file of their own (data/image_texts.py). A record's images stand before its instruction.
With `in_context`, the records that it names as its examples stand before it, as earlier turns that are learned too, as
Otter does. Which records and examples are drawn depends on sampling_seed and ids alone, not on ranks or workers.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_mm.constants import IMAGE_TOKEN
from mindspeed_mm.data.config import BasicParameters
from mindspeed_mm.data.conversation import checked_text, shown
from mindspeed_mm.data.datasets._files import FileRecords, Parsed, ReadOptions
from mindspeed_mm.data.image_texts import ImageText, JsonImages, ParquetImages, open_images
from mindspeed_mm.data.index import Index
from mindspeed_mm.data.json_members import JsonMembers
from mindspeed_mm.data.keys import keys
from mindspeed_mm.data.otter_parameters import MimicItParameters
from mindspeed_mm.data.sample import Turn, VideoFrames
from mindspeed_mm.data.storage.objects import local_file
from mindspeed_mm.errors import DataError

SAMPLING_SEED = 42
MAX_EXAMPLES = 64
MAX_IMAGES = 256
"""Of one record."""

RECORD = keys("a record", "instruction", "answer", "image_ids", "rel_ins_ids")
EXAMPLE = '{"instruction": "What is it?", "answer": "A cat.", "image_ids": ["LA_IMG_1"], "rel_ins_ids": []}'
LEADING = ",.!?*#:;~"


class MimicItFile:
    """The records of one file, each with its examples; see FileRecords for what is asked of it."""

    def __init__(
        self,
        path: str | Path,
        *,
        index: Index | None = None,
        problems: list[DataError] | None = None,
        chosen: MimicItParameters,
        seed: int,
        folder: Path | None,
    ):
        """`folder` is where the index of train_config is stored. Raises DataError for a file that cannot be read: what
        is damaged there ends check-data, too, so that `problems` stays as it is."""
        self.path, self._chosen, self._seed = Path(local_file(path)), chosen, seed
        self._members = JsonMembers(self.path, index=index, inside="data")
        self._listed: JsonMembers | None = None
        if chosen.train_config is not None:
            self._listed = JsonMembers(chosen.train_config, index=Index(chosen.train_config, folder))
        self._records = len(self._members if self._listed is None else self._listed)
        self._order = drawn_numbers(self._records, chosen.num_samples, seed)

    def __len__(self) -> int:
        return len(self._order)

    def where(self, number: int) -> str:
        """Name of a record for messages, by its place in the file."""
        return f"{self.path if self._listed is None else self._listed.path}: record {self._order[number]}"

    def line(self, number: int) -> int:
        """The line of the file on which it stands."""
        place = int(self._order[number])
        return (self._members if self._listed is None else self._listed).line(place)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """{"id", "entries": [(id, record), ...]}, the examples first. Raises DataError for an example that is not
        there."""
        place, turn = int(self._order[number]), number // self._records
        if self._listed is None:
            identity, entry = self._members.key(place), self._members.value(place)
            related = entry.get("rel_ins_ids", []) if isinstance(entry, Mapping) else []
        else:
            identity, related = self._listed.key(place), self._listed.value(place)
            entry = self._record(identity, self.where(number))
        where = f"{self.where(number)} (id {identity:.80})"
        examples = self._examples(related, identity, turn, where) if self._chosen.in_context else []
        entries = [(name, self._record(name, where)) for name in examples]
        return {"id": f"{identity}#{turn}" if turn else identity, "entries": [*entries, (identity, entry)]}

    verified = __getitem__

    def _examples(self, related: Any, identity: str, turn: int, where: str) -> list[str]:
        if not isinstance(related, list) or not all(isinstance(name, str) for name in related):
            raise DataError(f"{where}: its examples are {shown(related)}; expected a list of ids, such as [].")
        if len(related) > MAX_EXAMPLES:
            raise DataError(f"{where}: it has {len(related)} examples; at most {MAX_EXAMPLES} are read.")
        if identity in related:
            raise DataError(f"{where}: it is its own example, which would show the answer. Remove it from the list.")
        if self._chosen.shots is None or len(related) <= self._chosen.shots:
            return related
        draw = random.Random(f"{self._seed} {identity} {turn}")
        return [related[place] for place in sorted(draw.sample(range(len(related)), self._chosen.shots))]

    def _record(self, identity: str, where: str) -> Any:
        number = self._members.find(identity)
        if number is None:
            raise DataError(
                f'{where}: the id "{identity:.80}" is not in "data" of {self.path}; expected a record there. Add it, '
                "or remove the id."
            )
        return self._members.value(number)


def drawn_numbers(count: int, wanted: int, seed: int) -> np.ndarray:
    """[n] int64 numbers of the records that are read: each once for -1, else `wanted` of them, none more than once more
    often than another. In the order of the file, round by round."""
    if wanted == -1:
        return np.arange(count, dtype=np.int64)
    rounds, rest = divmod(wanted, count)
    more = np.sort(np.random.default_rng(seed).permutation(count)[:rest])
    return np.concatenate([np.tile(np.arange(count, dtype=np.int64), rounds), more])


def cleaned(text: str) -> str:
    """Otter's clean-up of questions and answers."""
    text = text.lower().lstrip(LEADING).replace("-", " ").replace("/", " ")
    return re.sub(r"\s{2,}", " ", text).strip()


def parse(
    record: dict[str, Any],
    options: ReadOptions,
    *,
    images: JsonImages | ParquetImages | None,
    chosen: MimicItParameters,
) -> Parsed:
    """Turns and images of a record with its examples. Raises DataError for a broken one."""
    turns: list[Turn] = []
    found: list[ImageText | VideoFrames] = []
    ignored: list[str] = []
    for identity, entry in record["entries"]:
        if not isinstance(entry, Mapping) or not {"instruction", "answer"} <= set(entry):
            raise DataError(f'"{identity:.80}" is {shown(entry)}; expected a record such as {EXAMPLE}.')
        own = _images(entry.get("image_ids", []), identity, images, chosen.images)
        texts = [checked_text(entry[key], f'"{key}" of "{identity:.80}"') for key in ("instruction", "answer")]
        question, answer = map(cleaned, texts) if chosen.clean_text else texts
        items = own if chosen.frames is None or not own else [VideoFrames(evenly(own, chosen.frames))]
        places = f"{IMAGE_TOKEN}\n" * len(items)
        turns.append(Turn("human", places + question, _literal(question, len(places))))
        turns.append(Turn("gpt", answer, _literal(answer, 0)))
        found += items
        ignored += RECORD.unused(entry, f'"{identity:.80}"', options.unknown_keys)
    return Parsed(tuple(turns), found, ignored=tuple(ignored))


def evenly(frames: Sequence[ImageText], most: int) -> tuple[ImageText, ...]:
    """At most so many of some frames, the first and the last among them."""
    if len(frames) <= most:
        return tuple(frames)
    return tuple(frames[int(place)] for place in np.linspace(0, len(frames) - 1, most))


def _literal(text: str, before: int) -> tuple[int, ...]:
    """Where the text, `before` characters into its turn, holds `<image>` as plain text."""
    return tuple(before + match.start() for match in re.finditer(re.escape(IMAGE_TOKEN), text))


def _images(names: Any, identity: str, images: JsonImages | ParquetImages | None, file: str | None) -> list[ImageText]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f'"image_ids" of "{identity:.80}" is {shown(names)}; expected a list of ids, such as ["LA_1"].')
    if len(names) > MAX_IMAGES:
        raise DataError(f'"image_ids" of "{identity:.80}" holds {len(names)} ids; at most {MAX_IMAGES} are read.')
    if names and images is None:
        raise DataError(
            f'"image_ids" of "{identity:.80}" names {shown(names[0])}, but the set has no images; give "images" in '
            '"mimic_it", or remove the ids.'
        )
    found = []
    for name in names:
        number = None if images is None else images.find(name)
        if images is None or number is None:
            raise DataError(
                f'"image_ids" of "{identity:.80}" names {shown(name)}, which is not in {file}; expected its base64 '
                "there. Give the images of the same release, or remove the record."
            )
        found.append(ImageText(f"{name} of {file}", images, number))
    return found


def dataset(parameters: BasicParameters, options: ReadOptions) -> FileRecords:
    """The source of a data set (see _files.py)."""
    chosen = parameters.mimic_it or MimicItParameters()
    given = {name: getattr(chosen, name) for name in ("images", "train_config")}
    chosen = chosen.model_copy(update={name: path and str(local_file(path)) for name, path in given.items()})
    seed = SAMPLING_SEED if parameters.sampling_seed is None else parameters.sampling_seed
    images = None if chosen.images is None else open_images(chosen.images, options.index_folder)
    reader = partial(MimicItFile, chosen=chosen, seed=seed, folder=options.index_folder)
    files = [
        os.stat(path) for path in (chosen.images, chosen.train_config) if path is not None and os.path.exists(path)
    ]
    key = {"format": __name__, "sampling_seed": seed, "files": [(file.st_size, file.st_mtime_ns) for file in files]}
    key |= chosen.model_dump(mode="json")
    source = FileRecords(
        parameters, options, partial(parse, images=images, chosen=chosen), reader=reader, key=key, lines=True
    )
    source.videos = chosen.frames is not None
    return source


DATASET = dataset
