"""LLaVA-NeXT's projector (Liu et al. 2024).

Legend: F features, Hv width of the encoder, H width of the decoder, T tiles.
"""

from __future__ import annotations

import math

import torch

from mindspeed_mm.errors import DataError
from mindspeed_mm.models.kit.linears import MLPProjector
from mindspeed_mm.models.media import Features
from mindspeed_mm.models.runtime import Runtime
from mindspeed_mm.models.tiles import UNPAD, unpadded


class TileProjector(MLPProjector):
    """Linears, then for each image the features of the whole image, and of its tiles as mm_patch_merge_type says.

    "spatial_unpad": line by line without the borders. A learned vector ends each line of tiles; an image of one row of
    pixels alone gets one behind its features. "spatial": line by line. "flat": tile by tile.
    """

    def __init__(self, spec, runtime: Runtime) -> None:
        super().__init__(spec, runtime)
        self.merge = spec.mm_patch_merge_type
        if spec.geometry.image_newline:
            self.image_newline = torch.nn.Parameter(torch.empty(spec.hidden_size))
            torch.nn.init.normal_(self.image_newline, std=spec.hidden_size**-0.5)

    def forward(self, features: Features) -> Features:
        """[F, Hv] -> [F', H]; `features.media` says tiles (rows), their grid and the sizes of the images."""
        values = self.encoder(features.values)
        if self.merge == "flat":
            return Features(values, features.counts, features.media)
        places, first, counts = [], 0, []
        newline = values.shape[0]  # the place behind all features
        media = features.media
        sizes, grids = media.sizes.tolist(), media.grid.tolist()
        for count, rows, size, (_, *grid) in zip(features.counts, media.rows, sizes, grids, strict=True):
            own = _places(count, rows, tuple(size), tuple(grid), first, newline if self.merge == UNPAD else None)
            places.append(own)
            counts.append(len(own))
            first += count
        order = torch.cat(places).to(values.device, non_blocking=True)
        if self.merge == UNPAD:
            values = torch.cat((values, self.image_newline.to(values.dtype)[None]))
        return Features(values.index_select(0, order), tuple(counts), media)


def _places(
    count: int, rows: int, size: tuple[int, int], grid: tuple[int, int], first: int, newline: int | None
) -> torch.Tensor:
    """[F'] int64 in host memory: where each feature of one item comes from.

    Args:
        count: features of the item, equally many for each of its `rows`.
        size, grid: of the image in pixels and tiles.
        first: place of the item's first feature.
        newline: place of the newline vector, None where lines are kept whole and have none.
    """
    end = torch.tensor([] if newline is None else [newline], dtype=torch.int64)
    if rows == 1:
        return torch.cat((torch.arange(first, first + count), end))
    patches = math.isqrt(count // rows)
    tiled = (grid[0] * grid[1] + 1) * patches**2
    if tiled != count:
        raise DataError(
            f"an image of {rows} tiles has {count} features; expected {grid[0]} x {grid[1]} tiles and the whole image, "
            "each a square of features"
        )
    whole = torch.arange(first, first + patches**2)
    lines = torch.arange(first + patches**2, first + count).view(*grid, patches, patches).transpose(1, 2)
    lines = lines.reshape(grid[0] * patches, grid[1] * patches)
    if newline is None:
        return torch.cat((whole, lines.flatten()))
    top, height, left, width = unpadded(size, tuple(lines.shape))
    lines = lines[top : top + height, left : left + width]
    return torch.cat((whole, torch.cat((lines, end.expand(height, 1)), dim=1).flatten()))
