"""Samples of any kind of data file as tokens and pixels, ready for collation."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from mindspeed_mm.data.expand import Encoding, expand_images, fit_length
from mindspeed_mm.data.facts import unanswered
from mindspeed_mm.data.feature_cache import FeatureCache
from mindspeed_mm.data.image import ImageError, load_image
from mindspeed_mm.data.lengths import UNUSABLE, usable_length
from mindspeed_mm.data.media import ItemPlan
from mindspeed_mm.data.pairs import Branches, longer_side, pair_tokens
from mindspeed_mm.data.parallel import count_all
from mindspeed_mm.data.reference_store import pair_key
from mindspeed_mm.data.rendering import questions_of
from mindspeed_mm.data.sample import CachedImage, Encoded, EncodedImage, Sample, VideoFrames
from mindspeed_mm.errors import DataError

logger = logging.getLogger(__name__)

Positions = Callable[[list[int], list[tuple[int, int, int]]], torch.Tensor]
"""Expanded ids and the grids of their images -> [3, length] int64."""

LEAST_JUDGED = 1000
"""max_skip_percent counts from so many samples, so that one bad image in the first batch stops no run."""

MAX_SKIPS = 1000
"""So many bad images in a row mean a wrong folder, not single damaged files."""


@dataclass(frozen=True)
class Policies:
    """What happens to samples that cannot be used as they are. See DatasetParam for the choices."""

    image_error: str = "error"
    overlong: str = "error"
    empty_answer: str = "mask"
    max_skip_percent: float = 5


def set_length(name: str, usable: int, records: int, repeat_time: float) -> int:
    """Samples of a set, of whose records `usable` are not left out. Raises DataError where there would be none."""
    length = int(usable * repeat_time)
    if records and not usable:
        raise DataError(
            f"{name}: all of its {records} records are left out; correct them, or change what data.json says of them "
            "(overlong, empty_answer, --seq-length)."
        )
    if not length:
        raise DataError(f"{name}: a share of {repeat_time} of {usable} records is none; raise repeat_time.")
    return length


class DataSet:
    """One source of the data config: its records, those that are left out, and how often it counts."""

    def __init__(self, source: Any, repeat_time: float, name: str):
        """`source` has len(), [number] -> Sample, `index` and `facts` (see datasets/_files.py)."""
        self.source, self.name = source, name
        self._repeat = repeat_time
        self._kept: np.ndarray | None = None
        self.lengths: np.ndarray | None = None
        """[n] int32 by record number, before truncation, negative without images; known after `measure`."""
        self.pairs = bool(getattr(source, "pairs", False))
        """Whether its records have a rejected answer, too."""
        self._max_length = 0
        self.dropped = self.truncated = 0
        """Records that are too long: left out, or cut."""
        self._count()

    def _count(self) -> None:
        usable = len(self.source) if self._kept is None else len(self._kept)
        self._length = set_length(self.name, usable, len(self.source), self._repeat)

    def _leave_out(self, numbers: np.ndarray) -> None:
        kept = np.arange(len(self.source)) if self._kept is None else self._kept
        self._kept = np.setdiff1d(kept, numbers, assume_unique=True)
        self._count()

    def __len__(self) -> int:
        return self._length

    def number(self, index: int) -> int:
        """Record number of a sample of this set."""
        if self._kept is None:
            return index % len(self.source)
        return int(self._kept[index % len(self._kept)])

    def all_lengths(self) -> np.ndarray:
        """[len(self)] int32, as the samples are trained on."""
        assert self.lengths is not None
        lengths = self.lengths if self._kept is None else self.lengths[self._kept]
        lengths = np.clip(lengths, -self._max_length, self._max_length)
        return lengths[: self._length] if self._length <= len(lengths) else np.resize(lengths, self._length)

    def measure(self, encoding: Encoding, max_length: int, policy: str) -> None:
        """Count the length of every record and leave out what the policy drops. Raises DataError under "error"."""
        source = self.source
        self.lengths = source.index.array(
            "lengths",
            np.int32,
            lambda: count_all(
                f"counting tokens of {self.name}",
                len(source),
                lambda number: usable_length(source[number], encoding, max_length, policy),
            ),
            **encoding.key,
            max_length=max_length,
            policy=policy,
        )
        self._max_length = 2 * max_length if self.pairs else max_length
        is_dropped = self.lengths == UNUSABLE
        unusable = np.flatnonzero(is_dropped)
        self.dropped = len(unusable)
        over = (self.lengths > self._max_length) | (self.lengths < -self._max_length)
        self.truncated = int((over & ~is_dropped).sum())
        if self.dropped or self.truncated:
            logger.warning(
                "%s: of %d records, %d are over %d tokens and left out, %d are cut to that length (overlong: %s)",
                *(self.name, len(source), self.dropped, max_length, self.truncated, policy),
            )
        if self.dropped:
            self._leave_out(unusable)

    def refuse_overlong(self, encoding: Encoding, max_length: int) -> None:
        """Raise DataError for the first record that is too long. Only those that might be are tokenised."""
        source = self.source

        def check() -> np.ndarray:
            fixed = encoding.media.fixed
            most = source.facts[:, 0] + source.facts[:, 1] * (len(fixed.ids) if fixed else max_length)
            numbers = np.flatnonzero(most > max_length)
            count_all(
                f"checking lengths of {self.name}",
                len(numbers),
                lambda i: usable_length(source[int(numbers[i])], encoding, max_length, "error"),
            )
            return np.ones(1, dtype=np.int32)

        source.index.array("fits", np.int32, check, **encoding.key, max_length=max_length)

    def tell_unused_keys(self) -> None:
        """Log once which keys of how many records nothing reads."""
        stored = self.source.index.array("unused keys", np.int64, self._unused_keys).reshape(-1, 2)
        for number, count in stored[1:].tolist():
            sample = self.source[number]
            names = ", ".join(dict.fromkeys(sample.ignored))
            logger.warning(
                "%s: %d records have keys that nothing reads: %s (the first is %s)",
                self.name,
                count,
                names,
                sample.where,
            )

    def _unused_keys(self) -> np.ndarray:
        """(first record, number of records) for each set of unused keys, behind a pair of zeros; flat."""
        digests, first, counts = np.unique(self.source.facts[:, 3], return_index=True, return_counts=True)
        pairs = np.stack([first, counts], axis=1)[digests != 0]
        return np.concatenate([np.zeros(2, dtype=np.int64), pairs.reshape(-1)])

    def set_empty_answer_policy(self, policy: str) -> None:
        """Refuse ("error"), leave out ("drop") or count ("mask") the records with an answer that has no text."""
        # Stored apart with a number in front: later starts need not touch the facts, and an array may not be empty.
        stored = self.source.index.array(
            "unanswered",
            np.int64,
            lambda: np.concatenate([np.zeros(1, dtype=np.int64), np.flatnonzero(self.source.facts[:, 2])]),
        )
        numbers = stored[1:]
        if not len(numbers):
            return
        message = unanswered(self.source[int(numbers[0])])
        if policy == "error":
            raise DataError(
                f'{message} Write the answer, remove the record, or set "empty_answer": "mask" (nothing is learned '
                f'from such a turn) or "drop" in dataset_param; {len(numbers)} records are like it.'
            )
        done = "are left out" if policy == "drop" else "are kept, nothing is learned from those turns"
        logger.warning("%s: %d records with an empty answer %s; %s", self.name, len(numbers), done, message)
        if policy == "drop":
            self._leave_out(numbers)


class MultimodalDataset(Dataset[Encoded]):
    """Map-style dataset of Encoded. The sets follow each other; images are decoded when a sample is asked for."""

    def __init__(
        self,
        sets: Sequence[DataSet],
        *,
        encoding: Encoding,
        max_length: int,
        positions: Positions | None = None,
        policies: Policies = Policies(),
        measured: bool = False,
    ):
        """`measured`: count all lengths now (for packing and grouping); otherwise only where a policy needs them."""
        self.sets = list(sets)
        self.encoding = encoding
        self.media = encoding.media
        self.policies = policies
        self.max_length = max_length
        self.longest = 2 * max_length if any(data_set.pairs for data_set in self.sets) else max_length
        """Positions that a sample has at most; the two answers of a preference record each may be `max_length` long."""
        self._positions = positions
        self.feature_cache: FeatureCache | None = None
        """Where features of images are looked up, once the vision encoder is there."""
        self.names_pairs = False
        """Whether preference records get the name under which a store keeps their log-probabilities."""
        self.epoch: np.ndarray | None = None
        """[n] int64 indices of the samples of an epoch, where data.json mixes the sets; None: all, each once."""
        self._lengths: np.ndarray | None = None
        for data_set in self.sets:
            data_set.tell_unused_keys()
            data_set.set_empty_answer_policy(policies.empty_answer)
            if measured or policies.overlong != "error":
                data_set.measure(encoding, max_length, policies.overlong)
            else:
                data_set.refuse_overlong(encoding, max_length)
        self._ends = np.cumsum([len(data_set) for data_set in self.sets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def epoch_samples(self) -> int:
        """Samples of an epoch."""
        return len(self) if self.epoch is None else len(self.epoch)

    @property
    def lengths(self) -> np.ndarray:
        """[n] int32 expanded length of every sample, negative without images. Needs `measured`."""
        if self._lengths is None:
            parts = [data_set.all_lengths() for data_set in self.sets]
            self._lengths = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return self._lengths

    def sample(self, index: int) -> Sample:
        """The checked record at `index`, images unopened."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        data_set = self.sets[number]
        return data_set.source[data_set.number(index - (int(self._ends[number - 1]) if number else 0))]

    def __getitem__(self, index: int) -> Encoded:
        """Sample `index`. Under the policy "skip" a sample whose image cannot be used is replaced by the next good one
        in the order of the files, so that every run and every resume makes the same choice.

        Raises DataError naming record, path and cause.
        """
        skipped: list[str] = []
        sample = self.sample(index)
        for step in range(1, min(len(self), MAX_SKIPS) + 1):
            try:
                return self._encode(sample, tuple(skipped))
            except ImageError as error:
                skipped.append(self._skipped(sample, error))
            sample = self.sample((index + step) % len(self))
        raise DataError(f"{len(skipped)} records in a row have no usable image, the last one: {skipped[-1]}")

    def row(self, indices: Sequence[int]) -> list[Encoded]:
        """The samples that share a row. Under the policy "skip" one whose image cannot be used leaves its place empty;
        the first of the rest carries the reason (or a sample without tokens, when nothing is left).
        """
        samples, skipped = [], []
        for index in indices:
            sample = self.sample(index)
            try:
                samples.append(self._encode(sample, ()))
            except ImageError as error:
                skipped.append(self._skipped(sample, error))
        if skipped:
            samples.append(Encoded("(skipped)", [], [], (), tuple(skipped)))
        return samples

    def _skipped(self, sample: Sample, error: ImageError) -> str:
        message = f"{sample.where}: {error}"
        if self.policies.image_error == "error":
            raise DataError(message) from error
        return message

    def _encode(self, sample: Sample, skipped: tuple[str, ...]) -> Encoded:
        plans = self.encoding.plans(sample)
        try:
            ids, labels, branches = self._tokens(sample, plans)
            asked = self.media.reads_instructions
            questions = [self.media.instruction(text) for text in questions_of(sample.turns)] if asked else []
        except DataError as error:
            raise type(error)(f"{sample.where}: {error}") from error
        features = tuple(self._known_features(image) for image in sample.images) if self.feature_cache else ()
        unknown = [image for image, known in zip_longest(sample.images, features) if not known or known.values is None]
        media = self._media(sample, unknown)
        if asked:
            media = tuple(replace(item, instructions=(q,)) for item, q in zip(media, questions, strict=True))
        positions = None
        if self._positions:
            whole = ids if branches is None else longer_side(ids, branches)
            positions = self._positions(whole, [plan.grid for plan in plans])
        key = pair_key(ids, labels, branches, media) if self.names_pairs and branches is not None else None
        return Encoded(sample.id, ids, labels, media, skipped, features, positions, branches, key)

    def _media(self, sample: Sample, images: Sequence[str | EncodedImage]) -> tuple[Any, ...]:
        """Images as the encoder takes them. Raises ImageError, which the policy decides on, and DataError naming the
        record where an object store does not give one."""
        try:
            return tuple(self.media.item(image) for image in images)
        except ImageError:
            raise
        except DataError as error:
            raise type(error)(f'{sample.where}: "image": {error}') from error

    def _tokens(self, sample: Sample, plans: list[ItemPlan]) -> tuple[list[int], list[int], Branches | None]:
        """Expanded ids and labels within the maximum length; of a preference record also the parts of its sides."""
        if sample.rejected is not None:
            return pair_tokens(sample, plans, self.encoding, self.max_length, self.policies.overlong)
        ids, labels = expand_images(*self.encoding.tokens(sample), plans)
        return *fit_length(ids, labels, self.max_length, self.policies.overlong), None

    def _known_features(self, image: str | EncodedImage | VideoFrames) -> CachedImage:
        """What the feature cache has of an image. Raises ImageError where its bytes cannot be read, DataError for a
        video."""
        assert self.feature_cache is not None
        if isinstance(image, VideoFrames):
            raise DataError(f"found a video ({image}), which a feature cache does not hold; leave out --feature-cache")
        try:
            key = self.feature_cache.key(image)
        except OSError as error:
            load_image(image)  # says what is wrong with a missing file
            raise ImageError(f"image {image} cannot be read ({error}).") from error
        return CachedImage(key, self.feature_cache.read(key))
