"""What is looked at before weights are read, where it takes seconds and would else end a run hours later."""

from __future__ import annotations

import logging
import operator
from functools import reduce

import torch

from megatron.driver.collectives import gather
from megatron.driver.initialize import is_rank_0
from mindspeed_mm.data.dataset import MultimodalDataset
from mindspeed_mm.data.presence import look_for_images
from mindspeed_mm.errors import DataError

logger = logging.getLogger(__name__)


def check_images(dataset: MultimodalDataset) -> None:
    """Look for the image files, each rank for its share, and say how many were looked at. Collective.

    Raises:
        DataError: some are missing, and image_error is "error"; names the first of them.
    """
    own = look_for_images(dataset, torch.distributed.get_rank(), torch.distributed.get_world_size())
    found = reduce(operator.add, gather(own))
    if not found.images:
        return
    looked = f"{found.images:,} images of {found.samples:,} records"
    if not found.is_whole:
        looked += f" of {found.all_samples:,}, then time was over; check-data looks at the rest"
    if found.missing:
        text = (
            f"{found.missing:,} image files are missing or empty (looked for {looked}):\n  "
            + "\n  ".join(found.examples)
            + "\nCorrect data_folder or the records (check-data lists more), or leave such records out with "
            '"image_error": "skip" in dataset_param'
        )
        if dataset.policies.image_error == "error":
            raise DataError(text)
        if is_rank_0():
            logger.warning("%s", text)
    elif is_rank_0():
        logger.info("images: looked for %s, all are there, none is empty", looked)
