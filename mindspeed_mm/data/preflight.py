"""Check-data: every record and image of a data set looked at before training, by all cores."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from mindspeed_mm.constants import IGNORE_INDEX, IMAGE_TOKEN
from mindspeed_mm.data.dataset import Policies
from mindspeed_mm.data.expand import Encoding
from mindspeed_mm.data.facts import longest_text, unanswered
from mindspeed_mm.data.image import FORMATS, ImageError, load_image, other_suffix
from mindspeed_mm.data.lengths import UNUSABLE, usable_length
from mindspeed_mm.data.pairs import pair_tokens
from mindspeed_mm.data.parallel import ordered
from mindspeed_mm.data.progress import progress_bar
from mindspeed_mm.data.sample import EncodedImage, Sample
from mindspeed_mm.data.tokenizer_base import Tokenizer
from mindspeed_mm.errors import DataError, UnknownKeyError

SHOWN = 100
"""Examples kept of each kind of problem."""

WORST = 20
"""Longest samples and largest images that are listed."""

ERROR, WARNING = "error", "warning"

KINDS = {
    "file": (ERROR, "the file cannot be read, or not to its end"),
    "settings": (ERROR, "the set and the data config do not go together"),
    "record": (ERROR, "a record is damaged or has the wrong shape"),
    "unknown key": (ERROR, "a key is mistyped, or changes training elsewhere and is not read here"),
    "template": (ERROR, "a conversation does not fit the template"),
    "missing image": (ERROR, "an image is missing"),
    "broken image": (ERROR, "an image cannot be decoded"),
    "unknown id": (ERROR, "a token has no row in the text decoder's embedding"),
    "too long": (ERROR, "a sample is longer than the maximum"),
    "no supervision": (ERROR, "nothing of a sample is supervised"),
    "empty answer": (ERROR, "an answer is empty"),
    "pair": (ERROR, "the two answers of a preference record cannot be compared"),
    "left out": (WARNING, "a record is left out, as overlong, empty_answer or image_error says"),
    "unused key": (WARNING, "nothing reads a key of a record"),
    "control token": (WARNING, "a text holds a control token, which stays text (special_text)"),
    "suffix": (WARNING, "an image is named with the suffix of another format (it is read by content)"),
    "orientation": (WARNING, "an image has an EXIF rotation, which training ignores as the original LLaVA does"),
    "frames": (WARNING, "an image has several frames, of which the first is used"),
    "duplicate id": (WARNING, "an id is used more than once"),
    "duplicate record": (WARNING, "a conversation with its images is there more than once"),
    "shared record": (WARNING, "a conversation with its images is in an earlier set, too"),
}
DUPLICATE_ADVICE = {
    "duplicate id": 'Expected an "id" of its own for each record; messages cannot tell these apart.',
    "duplicate record": "It counts as often in training; remove it where that is not meant.",
}
FORMAT_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg", ".mpo"),  # a JPEG with further ones behind it, as some cameras write
    "PNG": (".png",),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm"),
}
"""The first one is given to files whose suffix is wrong."""


@dataclass
class Found:
    """What was found in some records; parts of a set are merged into the whole."""

    records: int = 0
    images: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    """Expanded length of every sample, by template."""
    supervised: list[int] = field(default_factory=list)
    """Supervised tokens of every sample, with the config's template."""
    turns: Counter[int] = field(default_factory=Counter)
    images_per_sample: Counter[int] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    """Pixel modes of the images; "P" is a palette, "L" grey."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    longest: list[tuple[int, str]] = field(default_factory=list)
    largest: list[tuple[int, str]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    contents: list[int] = field(default_factory=list)
    pairs: bool | None = None
    """Whether they are preference records; of a whole set that could be opened."""
    bad_images: int = 0
    """Records that are left out for an image."""
    suffixes: dict[str, str] = field(default_factory=dict)
    """Name of an image in the records -> suffix it should have."""

    @property
    def broken_images(self) -> int:
        """Images found to be missing or broken."""
        return self.problems["missing image"] + self.problems["broken image"]

    def problem(self, kind: str, message: str) -> None:
        self.problems[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < SHOWN:
            examples.append(message)

    def merge(self, other: Found) -> None:
        """Take in what was found in the records that follow."""
        self.records += other.records
        self.images += other.images
        self.bad_images += other.bad_images
        for kind, messages in other.examples.items():
            mine = self.examples.setdefault(kind, [])
            mine += messages[: SHOWN - len(mine)]
        for template, lengths in other.lengths.items():
            self.lengths.setdefault(template, []).extend(lengths)
        for name in ("problems", "turns", "images_per_sample", "modes"):
            getattr(self, name).update(getattr(other, name))
        for name in ("supervised", "sizes", "ids", "contents"):
            getattr(self, name).extend(getattr(other, name))
        for name in ("longest", "largest"):
            setattr(self, name, sorted(getattr(self, name) + getattr(other, name), reverse=True)[:WORST])
        self.suffixes.update(other.suffixes)

    @property
    def errors(self) -> int:
        return sum(count for kind, count in self.problems.items() if KINDS[kind][0] == ERROR)

    @property
    def warnings(self) -> int:
        return sum(self.problems.values()) - self.errors


@dataclass(frozen=True)
class Check:
    """What is looked at in each record."""

    encodings: dict[str, Encoding]
    """By template; the first is the config's own."""

    max_length: int
    policies: Policies
    """Of the data config: what it leaves out is no error."""

    images: bool = True
    """Open and decode them."""

    rows: int | None = None
    """Rows of the text decoder's embedding, where a model config tells."""

    ask: Callable[[int, Sample], Any] | None = None
    """Of sets that are answered instead of trained on: raises DataError for a record (by its number) that cannot be
    asked."""

    answers: bool = True
    """Whether an empty answer is wrong."""

    @cached_property
    def _typed(self) -> re.Pattern[str]:
        """Control tokens that stay text where a turn holds them."""
        encoding = next(iter(self.encodings.values()))
        contents = encoding.tokenizer.control_tokens - {IMAGE_TOKEN} if encoding.special_text == "text" else ()
        return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or r"(?!)")

    def set_of(self, source: Any, name: str, *, processes: int | None = None) -> Found:
        """Look at all records of a source (see datasets/_files.py)."""
        whole = Found()
        count = len(source)
        with (
            progress_bar(f"checking {Path(name).name}", count) as advance,
            ordered(lambda numbers: self._part(source, numbers), count, processes=processes, alone_below=256) as parts,
        ):
            for part in parts:
                whole.merge(part)
                advance(part.records)
        for kind, hashes in (("duplicate id", whole.ids), ("duplicate record", whole.contents)):
            self._duplicates(whole, kind, hashes, source)
        return whole

    def _part(self, source: Any, numbers: range) -> Found:
        found = Found()
        for number in numbers:
            found.records += 1
            try:
                sample = source[number]
                if self.ask is not None:
                    self.ask(number, sample)
            except DataError as error:
                found.problem("unknown key" if isinstance(error, UnknownKeyError) else "record", str(error))
                found.ids.append(-number - 1)
                found.contents.append(-number - 1)
                continue
            self._sample(sample, found)
        return found

    def _sample(self, sample: Sample, found: Found) -> None:
        found.ids.append(_hash(sample.id))
        turns = [*sample.turns, *(sample.rejected or ())]
        content = [f"{turn.role} {turn.text}" for turn in turns] + [str(image) for image in sample.images]
        found.contents.append(_hash("\0".join(content)))
        found.turns[len(sample.turns)] += 1
        found.images_per_sample[len(sample.images)] += 1
        if sample.ignored:
            found.problem("unused key", f"{sample.where}: {', '.join(dict.fromkeys(sample.ignored))}")
        left_out = self._answers(sample, found)
        reason, unplanned = self._tokens(sample, found, left_out is not None)
        left_out, problem, before = reason or left_out, None, found.broken_images
        for image in sample.files:
            found.images += 1
            if self.images:
                problem = self._image(image, sample.where, found) or problem
        if unplanned and problem is None and found.broken_images == before:
            problem = self._broken("broken image", unplanned, found)
        found.bad_images += problem is not None and left_out is None
        if left_out or problem:
            found.problem("left out", left_out or problem or "")

    def _answers(self, sample: Sample, found: Found) -> str | None:
        """Look for an empty answer. The reason, where the record is left out for it."""
        reason = unanswered(sample) if self.answers else None
        if reason is None or self.policies.empty_answer == "drop" and self.ask is None:
            return reason
        found.problem("empty answer", f"{reason} Write the answer, or remove the record.")
        return None

    def _tokens(self, sample: Sample, found: Found, left_out: bool) -> tuple[str | None, str | None]:
        """Look at tokens and lengths, of a record that is `left_out` for its own sake or not.

        Returns:
            The reason, where it is left out for its length; and why the model takes no image of its size.
        """
        reason = unplanned = None
        for number, (template, encoding) in enumerate(self.encodings.items()):
            try:
                ids, labels = encoding.of(sample)
            except ImageError as error:  # most often one that cannot be opened, which is told of the image
                unplanned = unplanned or f"{sample.where}: {error}"
                continue
            except DataError as error:
                if number == 0:
                    found.problem("template", f"{sample.where}: {error}")
                continue
            found.lengths.setdefault(template, []).append(len(ids))
            if number:
                continue
            kept = labels[: self.max_length]
            supervised = sum(label != IGNORE_INDEX for label in kept)
            found.supervised.append(supervised)
            found.longest = sorted([*found.longest, (len(ids), sample.where)], reverse=True)[:WORST]
            other, is_pair = list[int](), True
            if sample.rejected is not None:
                other, _ = encoding.of(replace(sample, turns=sample.rejected))
                found.lengths.setdefault(f"{template}, rejected", []).append(len(other))
                ids = max(ids, other, key=len)
                try:
                    pair_tokens(sample, encoding.plans(sample), encoding)
                except DataError as error:
                    is_pair = False
                    found.problem("pair", f"{sample.where}: {error}")
            self._ids([*ids, *other], sample, encoding.tokenizer, found)
            if self.ask is not None:
                continue
            length = f"{sample.where}: {len(ids)} tokens, the maximum is {self.max_length}"
            if len(ids) > self.max_length and self.policies.overlong == "error":
                found.problem(
                    "too long",
                    f"{length}. {longest_text(sample)} "
                    'Shorten it, raise --seq-length, or set "overlong": "truncate" or "drop".',
                )
            elif is_pair and self._is_dropped(ids, sample, encoding):
                reason = f'{length}; "overlong": "{self.policies.overlong}" leaves it out.'
            if not (supervised or left_out or reason):
                found.problem(
                    "no supervision",
                    f"{sample.where}: no token within the maximum length of {self.max_length} is supervised; expected "
                    "an answer that begins before.",
                )
        return reason, unplanned

    def _is_dropped(self, ids: list[int], sample: Sample, encoding: Encoding) -> bool:
        """Whether training leaves a sample out for its length, of which `ids` are the longer side."""
        policy = self.policies.overlong
        return len(ids) > self.max_length and usable_length(sample, encoding, self.max_length, policy) == UNUSABLE

    def _ids(self, ids: list[int], sample: Sample, tokenizer: Tokenizer, found: Found) -> None:
        """Ids that the embedding does not have, and tokens that became text."""
        if self.rows is not None and max(ids) >= self.rows:
            token = tokenizer.pieces([max(ids)])[0]
            found.problem(
                "unknown id",
                f"{sample.where}: {token!r} is id {max(ids)}, the embedding has {self.rows} rows; expected the "
                "tokenizer of the text decoder's weights, or a checkpoint and language_vocab_size with a row for it.",
            )
        match = next((match for turn in sample.turns if (match := self._typed.search(turn.text))), None)
        if match is not None:
            found.problem(
                "control token",
                f"{sample.where}: {match.group()!r} is split into the tokens of its characters; if it is meant as the "
                'token, set "special": false in its entry of added_tokens_decoder, or "special_text": "tokens".',
            )

    def _image(self, image: str | EncodedImage, where: str, found: Found) -> str | None:
        """Decode an image. The reason, where its record is left out for it."""
        try:
            pil_image = load_image(image)
        except ImageError as error:
            gone = isinstance(image, str) and not os.path.exists(image)  # also under a name that no file can have
            missing = gone or isinstance(error.__cause__, FileNotFoundError)
            other = other_suffix(image) if missing else None
            if other is not None:
                found.suffixes[str(image)] = other.suffix
            return self._broken("missing image" if missing else "broken image", f"{where}: {error}", found)
        found.sizes.append(pil_image.size)
        found.largest = sorted(
            [*found.largest, (pil_image.width * pil_image.height, f"{where}: {image}")], reverse=True
        )
        del found.largest[WORST:]
        if isinstance(image, str):
            self._file(Path(image), where, found)
        return None

    def _broken(self, kind: str, message: str, found: Found) -> str | None:
        """Note an image that cannot be used; or the message, where its record is left out for it."""
        if self.policies.image_error == "skip" and self.ask is None:
            return message
        found.problem(kind, message)
        return None

    def _file(self, path: Path, where: str, found: Found) -> None:
        """The header once more, for what decoding does not tell."""
        try:
            with Image.open(path, formats=FORMATS) as pil_image:
                kind, mode = pil_image.format or "?", pil_image.mode
                rotated = pil_image.getexif().get(0x0112, 1) != 1
                has_frames = kind != "MPO" and getattr(pil_image, "is_animated", False)
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError, EOFError) as error:
            found.problem("broken image", f"{where}: {path}: {error}")
            return
        found.modes[f"{kind} {mode}"] += 1
        if rotated:
            found.problem(
                "orientation", f"{where}: {path} is stored turned; expected upright pixels. Turn them, or leave it so."
            )
        if has_frames:
            found.problem("frames", f"{where}: {path} ({kind}); write the frame that is meant to a file of its own.")
        expected = FORMAT_SUFFIXES.get(kind, (path.suffix,))
        if path.suffix.lower() not in expected:
            found.problem("suffix", f"{where}: {path} holds {kind}; its suffix should be {expected[0]}.")
            found.suffixes[str(path)] = expected[0]

    @staticmethod
    def _duplicates(whole: Found, kind: str, hashes: Sequence[int], source: Any) -> None:
        values = np.asarray(hashes, dtype=np.int64)
        _, first, counts = np.unique(values, return_index=True, return_counts=True)
        extra = int((counts - 1).sum())
        if not extra:
            return
        repeated = np.flatnonzero(counts > 1)
        for index in repeated[np.argsort(first[repeated])][:SHOWN]:
            others = np.flatnonzero(values == values[first[index]])[1:]
            again = ", ".join(str(number) for number in others[:5]) + (", ..." if len(others) > 5 else "")
            whole.problem(kind, f"{source[int(first[index])].where}: again in record {again}. {DUPLICATE_ADVICE[kind]}")
        whole.problems[kind] = extra


def shared_records(earlier: Sequence[Found], found: Found, source: Any) -> None:
    """Note the records of a set that an earlier one holds, too, such as training records among those of validation."""
    known = np.concatenate([np.asarray(other.contents, dtype=np.int64) for other in earlier]) if earlier else []
    values = np.asarray(found.contents, dtype=np.int64)
    numbers = np.flatnonzero(np.isin(values, known) & (values >= 0))
    for number in numbers[:SHOWN]:
        found.problem("shared record", f"{source[int(number)].where}: an earlier set of the config holds it, too.")
    if len(numbers):
        found.problems["shared record"] = len(numbers)


def _hash(text: str) -> int:
    """63 bits, not negative: those stand for records that cannot be compared."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
