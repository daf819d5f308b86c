"""Expanded lengths of all samples, known before training.

They are counted once by all cores, stored like other indexes, and cost 4 bytes a record.
"""

from __future__ import annotations

import numpy as np

from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
from mindspeed_mm.data.expand import Encoding, fit_length
from mindspeed_mm.data.facts import longest_text
from mindspeed_mm.data.image import ImageError
from mindspeed_mm.data.media import ItemPlan
from mindspeed_mm.data.pairs import pair_tokens
from mindspeed_mm.data.sample import Sample
from mindspeed_mm.errors import DataError

UNUSABLE = np.iinfo(np.int32).min
"""Length of a sample that the policy leaves out."""


def usable_length(sample: Sample, encoding: Encoding, max_length: int, policy: str) -> int:
    """Length of a sample before it is cut, negative without images, UNUSABLE where the policy leaves it out.

    An image whose size is needed and cannot be read counts as one position: its sample is refused or replaced when its
    turn comes. Raises DataError for a sample that is too long under the policy "error".
    """
    if sample.rejected is not None:
        return _pair_length(sample, encoding, max_length, policy)
    try:
        ids, labels = encoding.of(sample)
    except ImageError:
        ids, labels = encoding.tokens(sample)
    if len(ids) > max_length and policy == "drop":
        return UNUSABLE
    try:
        fit_length(ids, labels, max_length, policy)
    except DataError as error:
        if policy == "error":
            raise type(error)(f"{sample.where}: {error} {longest_text(sample)}") from error
        return UNUSABLE
    return len(ids) if sample.images else -len(ids)


def _pair_length(sample: Sample, encoding: Encoding, max_length: int, policy: str) -> int:
    """As `usable_length`, of both sides of a preference record with what they share, as they will be cut."""
    try:
        plans = encoding.plans(sample)
    except ImageError:
        plans = [ItemPlan((1, 1, 1), (IMAGE_TOKEN_INDEX,))] * len(sample.images)
    try:
        pair_tokens(sample, plans, encoding)
    except DataError as error:  # no matter of its length
        raise type(error)(f"{sample.where}: {error}") from error
    try:
        found = pair_tokens(sample, plans, encoding, max_length, "error" if policy == "drop" else policy)
    except DataError as error:
        if policy == "error":
            raise type(error)(f"{sample.where}: {error} {longest_text(sample)}") from error
        return UNUSABLE
    return len(found.input_ids) if sample.images else -len(found.input_ids)
