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
    """Replace the embeddings at image positions by image features, in reading order.

    Args:
        embeddings: [S, B, H].
        features: [N, P, H] projected features, images in reading order (row by row); N may be 0.
        positions: bool [B, S], best in host memory: where they are True is then known without waiting for the device.

    Returns:
        [S, B, H]; depends on `features` even when there are none, so that every rank runs the same backward pass.

    Raises:
        DataError: the number of image positions differs from N * P.
    """
    rows, columns = (x.to(embeddings.device, non_blocking=True) for x in positions.nonzero(as_tuple=True))
    wanted, found = rows.numel(), features.shape[0] * features.shape[1]
    if wanted != found:
        raise DataError(
            f"the batch has {wanted} image positions but {features.shape[0]} images of {features.shape[1]} tokens "
            f"each = {found} features: expand each image placeholder to {features.shape[1]} positions"
        )
    flat = features.reshape(-1, features.shape[-1]).to(embeddings.dtype)
    return embeddings.index_put((columns, rows), flat)
