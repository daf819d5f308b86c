"""Samples of any kind of data file as tokens and pixels, ready for collation."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch.utils.data import Dataset

from mindspeed_mm.data.expand import expand_images, fit_length
from mindspeed_mm.data.image import ImageError, ImageProcessor, preprocess
from mindspeed_mm.data.sample import Encoded, Sample
from mindspeed_mm.data.template import Template, encode_turns
from mindspeed_mm.data.tokenizer_base import Tokenizer
from mindspeed_mm.errors import DataError

MAX_SKIPS = 1000
"""So many bad images in a row mean a wrong folder, not single damaged files."""


class MultimodalDataset(Dataset[Encoded]):
    """Map-style dataset of Encoded. `sources` are concatenated; images are decoded when a sample is asked for."""

    def __init__(
        self,
        sources: Sequence[Any],
        *,
        tokenizer: Tokenizer,
        template: Template,
        image_processor: ImageProcessor,
        pad: bool,
        tokens_per_image: int,
        max_length: int,
        image_error: str = "error",
        overlong: str = "error",
    ):
        self._sources = list(sources)
        self._ends = list(accumulate(len(source) for source in sources))
        self._tokenizer = tokenizer
        self._template = template
        self.image_processor = image_processor
        self._pad = pad
        self._tokens_per_image = tokens_per_image
        self._max_length = max_length
        self._image_error = image_error
        self._overlong = overlong

    def __len__(self) -> int:
        return self._ends[-1]

    def sample(self, index: int) -> Sample:
        """The checked record at `index`, images unopened."""
        source = bisect_right(self._ends, index)
        start = self._ends[source - 1] if source else 0
        return self._sources[source][index - start]

    def __getitem__(self, index: int) -> Encoded:
        """Sample `index`. Under the policy "skip" a sample whose image cannot be used is replaced by the next good one
        in the order of the files, so that every run and every resume makes the same choice.

        Raises DataError naming record, path and cause.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        skipped: list[str] = []
        for step in range(min(len(self), MAX_SKIPS)):
            sample = self.sample((index + step) % len(self))
            try:
                return self._encode(sample, tuple(skipped))
            except ImageError as error:
                message = f"{sample.where}: {error}"
                if self._image_error == "error":
                    raise DataError(message) from error
                skipped.append(message)
            except DataError as error:
                raise type(error)(f"{sample.where}: {error}") from error
        raise DataError(f"{len(skipped)} records in a row have no usable image, the last one: {skipped[-1]}")

    def _encode(self, sample: Sample, skipped: tuple[str, ...]) -> Encoded:
        ids, labels = encode_turns(sample.turns, self._tokenizer, self._template)
        ids, labels = expand_images(ids, labels, self._tokens_per_image)
        ids, labels = fit_length(ids, labels, self._max_length, self._overlong)
        images = tuple(preprocess(path, self.image_processor, self._pad) for path in sample.images)
        return Encoded(sample.id, ids, labels, images, skipped)
