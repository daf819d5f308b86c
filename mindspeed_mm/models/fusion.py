"""Puts image features where the data expanded image placeholders. Legend: S sequence, B batch, H hidden size."""

from __future__ import annotations

import torch

from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
from mindspeed_mm.errors import DataError


def image_positions(input_ids: torch.Tensor, image_token_id: int | None = None) -> torch.Tensor:
    """bool [B, S], True where an image token stands (IMAGE_TOKEN_INDEX or `image_token_id`)."""
    positions = input_ids == IMAGE_TOKEN_INDEX
    if image_token_id is not None:
        positions = positions | (input_ids == image_token_id)
    return positions


def scatter_features(embeddings: torch.Tensor, features: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Replace the embeddings at image positions by features, in reading order.

    Args:
        embeddings: [S, B, H].
        features: [F, H] projected features of all items in reading order (row by row); F may be 0.
        positions: bool [B, S], best in host memory: where they are True is then known without waiting for the device.

    Returns:
        [S, B, H]; depends on `features` even when there are none, so that every rank runs the same backward pass.

    Raises:
        DataError: the number of image positions is not F.
    """
    rows, columns = (x.to(embeddings.device, non_blocking=True) for x in positions.nonzero(as_tuple=True))
    if rows.numel() != features.shape[0]:
        raise DataError(
            f"the batch has {rows.numel()} image positions but its images have {features.shape[0]} features: expand "
            "each image placeholder to one position for each feature of its image"
        )
    return embeddings.index_put((columns, rows), features.to(embeddings.dtype))
