"""Qwen2.5-VL's vision encoder on megatron.core's parallel layers.

Legend: I items, R patches of all items, U merged squares (units) of all items, H width, D channels of a head.
"""

from __future__ import annotations

import functools

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock

from mindspeed_mm.errors import DataError
from mindspeed_mm.models.kit.attention import ScopedSegments
from mindspeed_mm.models.kit.rotary import inverse_frequencies
from mindspeed_mm.models.kit.specs import LayerOptions, block_spec
from mindspeed_mm.models.media import Features, Media
from mindspeed_mm.models.runtime import Runtime, encoder_config
from mindspeed_mm.platform.segments import Segments

Grid = tuple[int, int, int]
"""Frames, and patches down and across, of an item."""


class PatchVisionEncoder(MegatronModule):
    """Patches of images of any size, embedded by one matrix product; rotary positions by row and column; attention
    inside windows, and in some layers over an image (a frame of a video).

    Patches arrive in merged squares, and leave so. In between they stand window by window.
    """

    def __init__(self, spec, runtime: Runtime) -> None:
        config = encoder_config(spec, runtime)
        super().__init__(config=config)
        self.spec = spec
        self.patch_embedding = torch.nn.Linear(spec.patch_channels, spec.hidden_size, bias=False)
        scopes = ["items" if layer in spec.full_attention_layers else "windows" for layer in range(spec.num_layers)]
        self.decoder = TransformerBlock(
            config=config,
            spec=block_spec([LayerOptions(scope=scope) for scope in scopes], causal=False),
            pre_process=True,
            post_process=True,
            post_layer_norm=False,
        )
        torch.nn.init.normal_(self.patch_embedding.weight, std=config.init_method_std)

    def forward(self, media: Media) -> Features:
        """A feature for each patch: pixels [R, channels * frames * patch * patch] -> [R, H].

        Raises DataError where the grids of the items say another number of patches.
        """
        grids = [tuple(grid) for grid in media.grid.tolist()]
        weight, unit = self.patch_embedding.weight, self.spec.spatial_merge_size**2
        if sum(frames * rows * columns for frames, rows, columns in grids) != media.pixels.shape[0]:
            raise DataError(f"{media.pixels.shape[0]} patches of pixels came with the grids {grids}; expected as many")
        order, windows, frames = _arrange(grids, self.spec.spatial_merge_size, self.spec.window_units)
        order = order.to(weight.device, non_blocking=True)
        segments = ScopedSegments(
            windows=Segments.of_lengths([unit * units for units in windows], weight.device),
            items=Segments.of_lengths(frames, weight.device),
        )
        hidden = self.patch_embedding(media.pixels.to(weight.dtype))
        hidden = self.decoder(
            hidden_states=_take_units(hidden, order, unit).unsqueeze(1),
            attention_mask=None,
            rotary_pos_emb=self._cos_sin(grids, order),
            packed_seq_params=segments,
        ).squeeze(1)
        counts = tuple(frames * rows * columns for frames, rows, columns in grids)
        return Features(_take_units(hidden, order.argsort(), unit), counts, media)

    def _cos_sin(self, grids: list[Grid], order: torch.Tensor) -> torch.Tensor:
        """[2, R, 1, 1, 1, D / 2]: the first half of the pairs of channels turns by row, the second one by column."""
        merge = self.spec.spatial_merge_size
        places = torch.cat([_places(grid, merge) for grid in grids]).to(order.device, non_blocking=True)
        frequencies = inverse_frequencies(self.spec.kv_channels // 2, self.spec.rope_theta, None).to(order.device)
        angles = (_take_units(places, order, merge**2).float()[..., None] * frequencies).flatten(1)
        return torch.stack((angles.cos(), angles.sin())).to(self.config.params_dtype)[:, :, None, None, None]

    def blank(self) -> Media:
        """One merged square of zeros."""
        merge = self.spec.spatial_merge_size
        pixels = self.patch_embedding.weight.new_zeros(merge**2, self.spec.patch_channels)
        return Media(pixels, (merge**2,), torch.tensor([[1, merge, merge]]), torch.zeros(1, 2, dtype=torch.int64))

    def blank_features(self) -> Features:
        """The features of `blank`, zeros."""
        blank = self.blank()
        return Features(blank.pixels.new_zeros(blank.rows[0], self.spec.hidden_size), blank.rows, blank)

    def set_input_tensor(self, input_tensor: torch.Tensor | None) -> None:
        """The encoder lives on the first pipeline stage and never receives hidden states."""


def _take_units(x: torch.Tensor, order: torch.Tensor, unit: int) -> torch.Tensor:
    """[R, ...] with its groups of `unit` rows in another order [U]."""
    return x.view(-1, unit, *x.shape[1:])[order].flatten(0, 1)


def _arrange(grids: list[Grid], merge: int, window: int) -> tuple[torch.Tensor, list[int], list[int]]:
    """How units stand window by window.

    Returns:
        (for each place the number of its unit [U] int64 in host memory, units of each window, patches of each frame)
    """
    orders, windows, frames, first = [], [], [], 0
    for time, rows, columns in grids:
        order, sizes = _windows(rows // merge, columns // merge, window)
        for _ in range(time):
            orders.append(order + first)
            windows += sizes
            frames.append(rows * columns)
            first += len(order)
    return torch.cat(orders), windows, frames


@functools.lru_cache(maxsize=1024)
def _windows(rows: int, columns: int, window: int) -> tuple[torch.Tensor, list[int]]:
    """The units of one frame window by window, and how many each window has; those at the borders have fewer."""
    numbers = torch.arange(rows * columns).view(rows, columns)
    own = [
        numbers[top : top + window, left : left + window].flatten()
        for top in range(0, rows, window)
        for left in range(0, columns, window)
    ]
    return torch.cat(own), [len(units) for units in own]


@functools.lru_cache(maxsize=1024)
def _places(grid: Grid, merge: int) -> torch.Tensor:
    """[patches, 2] int64: row and column of each patch of an item, in the order in which patches arrive."""
    time, rows, columns = grid
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(rows, columns, 2)
    squares = places.view(rows // merge, merge, columns // merge, merge, 2).transpose(1, 2)
    return squares.reshape(-1, 2).repeat(time, 1)
