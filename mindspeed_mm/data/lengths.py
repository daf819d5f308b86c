"""Expanded lengths of all samples, known before training.

They are counted once by all cores, stored like other indexes, and cost 4 bytes a record.
"""

from __future__ import annotations

import numpy as np

from mindspeed_mm.data.expand import Encoding, fit_length
from mindspeed_mm.data.facts import longest_text
from mindspeed_mm.data.image import ImageError
from mindspeed_mm.data.sample import Sample
from mindspeed_mm.errors import DataError

UNUSABLE = np.iinfo(np.int32).min
"""Length of a sample that the policy leaves out."""


def usable_length(sample: Sample, encoding: Encoding, max_length: int, policy: str) -> int:
    """Length of a sample before it is cut, negative without images, UNUSABLE where the policy leaves it out.

    An image whose size is needed and cannot be read counts as one position: its sample is refused or replaced when its
    turn comes. Raises DataError for a sample that is too long under the policy "error".
    """
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
