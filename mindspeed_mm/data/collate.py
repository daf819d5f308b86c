"""Samples to a batch: right padding, labels shifted to the next token, images in reading order."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mindspeed_mm.constants import IGNORE_INDEX
from mindspeed_mm.data.pairs import pair_positions
from mindspeed_mm.data.sample import Batch, CachedImages, Encoded
from mindspeed_mm.models.media import Media


@dataclass(frozen=True)
class Collator:
    """Makes a Batch of samples, one in a row, or of lists of samples that share a row."""

    pad_token_id: int

    pad_multiple: int = 1
    """Rows are as long as the longest, rounded up to a multiple of this."""

    row_length: int | None = None
    """Length of packed rows (rounded up likewise)."""

    def __call__(self, rows: Sequence[Encoded] | Sequence[Sequence[Encoded]]) -> Batch:
        """B rows -> Batch; see there for shapes and dtypes."""
        pairs = any(sample.branches is not None for row in rows for sample in _members(row))
        packed = self.row_length is not None or pairs
        filled = [_members(row) for row in rows]
        longest = self.row_length or max(sum(len(sample.input_ids) for sample in row) for row in filled)
        length = -(-longest // self.pad_multiple) * self.pad_multiple
        shape = (len(filled), length)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        samples = [sample for row in filled for sample in row]
        position_ids = torch.arange(length).repeat(len(filled), 1)
        if any(sample.positions is not None for sample in samples):
            position_ids = position_ids.repeat(3, 1, 1)
        segment_ids = torch.zeros(shape, dtype=torch.int64)
        for row, members in enumerate(filled):
            start = 0
            for segment, sample in enumerate(members, 1):
                end = start + len(sample.input_ids)
                input_ids[row, start:end] = torch.tensor(sample.input_ids, dtype=torch.int64)
                labels[row, start : max(end - 1, start)] = torch.tensor(sample.labels[1:], dtype=torch.int64)
                segment_ids[row, start:end] = segment
                if packed:
                    position_ids[..., row, start:] = torch.arange(length - start)
                if sample.branches is not None:
                    position_ids[..., row, start:end] = pair_positions(sample.branches, sample.positions)
                elif sample.positions is not None:
                    position_ids[:, row, start:end] = sample.positions
                start = end
            if packed:  # the padding behind the last sample is a sequence of its own
                position_ids[..., row, start:] = torch.arange(length - start)
        media = [item for sample in samples for item in sample.media]
        used = [sample for sample in samples if sample.input_ids]
        counted = [sample for sample in used if sample.branches is not None] if pairs else used
        return Batch(
            input_ids=input_ids,
            labels=labels,
            position_ids=position_ids,
            media=Media.join(media) if media else None,
            sample_ids=[sample.sample_id for sample in counted],
            tokens=sum(len(sample.input_ids) for sample in samples),
            supervised=int((labels != IGNORE_INDEX).sum()),
            lengths=tuple(len(sample.input_ids) for sample in used),
            skipped=tuple(reason for sample in samples for reason in sample.skipped),
            segment_ids=segment_ids if packed else None,
            cached=_cached(samples),
            branches=tuple(sample.branches or (len(sample.input_ids),) for sample in used) if pairs else None,
            pair_keys=_pair_keys(counted),
        )


def _members(row: Encoded | Sequence[Encoded]) -> list[Encoded]:
    """The samples of a row."""
    return list(row) if isinstance(row, Sequence) else [row]


def _pair_keys(samples: Sequence[Encoded]) -> tuple[bytes, ...] | None:
    """Names of all pairs; None where they have none, or there are none."""
    keys = tuple(sample.pair_key for sample in samples if sample.pair_key is not None)
    return keys if keys and len(keys) == len(samples) else None


def _cached(samples: Sequence[Encoded]) -> CachedImages | None:
    """What a feature cache knows of the images; None without one."""
    images = [image for sample in samples for image in sample.features]
    if not images:
        return None
    known = [image.values for image in images if image.values is not None]
    return CachedImages(
        keys=tuple(image.key for image in images),
        known=tuple(image.values is not None for image in images),
        features=torch.cat(known) if known else torch.empty(0),
    )
