"""Samples to a batch: right padding, labels shifted to the next token, images in reading order."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mindspeed_mm.constants import IGNORE_INDEX
from mindspeed_mm.data.sample import Batch, Encoded


@dataclass(frozen=True)
class Collator:
    """Makes a Batch of Encoded samples; rows are as long as the longest, rounded up to `pad_multiple`."""

    pad_token_id: int
    image_size: tuple[int, int]
    """(height, width) of the images, for batches without any."""

    pad_multiple: int = 1

    def __call__(self, samples: Sequence[Encoded]) -> Batch:
        """B samples -> Batch; see there for shapes and dtypes."""
        longest = max(len(sample.input_ids) for sample in samples)
        length = -(-longest // self.pad_multiple) * self.pad_multiple
        shape = (len(samples), length)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        for row, sample in enumerate(samples):
            size = len(sample.input_ids)
            input_ids[row, :size] = torch.tensor(sample.input_ids)
            labels[row, : size - 1] = torch.tensor(sample.labels[1:])
        images = [image for sample in samples for image in sample.images]
        pixel_values = torch.stack(images) if images else torch.zeros(0, 3, *self.image_size)
        return Batch(
            input_ids=input_ids,
            labels=labels,
            position_ids=torch.arange(length).repeat(len(samples), 1),
            pixel_values=pixel_values,
            sample_ids=[sample.sample_id for sample in samples],
            tokens=sum(len(sample.input_ids) for sample in samples),
            supervised=int((labels != IGNORE_INDEX).sum()),
            lengths=tuple(len(sample.input_ids) for sample in samples),
            skipped=tuple(reason for sample in samples for reason in sample.skipped),
        )
