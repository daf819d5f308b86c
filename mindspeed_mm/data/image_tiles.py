"""Images as tiles (LLaVA-NeXT): the whole image at the encoder's size, then the tiles of a larger copy of it.

Equal to transformers' LlavaNextImageProcessor (its Pillow backend), of which the tokens around them are not part.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mindspeed_mm.config.load import read_json
from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
from mindspeed_mm.data.image import CONFIG_NAMES, ImageProcessor, as_rgb, check_pixels, config_file, resized
from mindspeed_mm.data.image import preprocess as preprocess_image
from mindspeed_mm.data.media import ItemPlan, MediaProcessor
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.media import Media
from mindspeed_mm.models.tiles import UNPAD, best_resolution, resized_size, tile_features, tile_grid

TILE_TYPES = ("LlavaNextImageProcessor", "LlavaNextImageProcessorFast", "LlavaNextImageProcessorPil")
"""Names under which transformers saves the processor that makes tiles."""

OWN_KEYS = ("image_grid_pinpoints", "do_pad")
"""Keys that it has beside those of CLIP's; do_pad fills a batch up with empty tiles, which are not needed here."""


class TiledImages(MediaProcessor):
    """Images of any size, cut into tiles of one size."""

    def __init__(
        self,
        source: dict[str, Any] | str | Path,
        pinpoints: Sequence[tuple[int, int]],
        *,
        side: int,
        patches: int,
        merge: str = UNPAD,
        fast_resize: bool = False,
    ) -> None:
        """
        Args:
            source: a preprocessor_config.json of transformers' LlavaNextImageProcessor, or of the encoder's own
                processor, as the original code has it: its content, the file or its folder.
            pinpoints: heights and widths that an image may be resized to, multiples of `side`.
            side: pixels of a tile, the encoder's image_size.
            patches: features in a line of a tile.
            merge: how features of tiles are put together, LLaVA's mm_patch_merge_type.
            fast_resize: resize with torch's kernel.

        Raises:
            ConfigError: a processor of another family, other pinpoints, tiles of another size.
        """
        self.processor, given = _read(source)
        self.pinpoints = [tuple(pair) for pair in pinpoints]
        self.side, self.patches, self.merge, self.fast_resize = side, patches, merge, fast_resize
        if given is not None and [tuple(pair) for pair in given] != self.pinpoints:
            raise ConfigError(
                f"the image processor has image_grid_pinpoints {_short(given)}, the model "
                f"{_short(self.pinpoints)} (image_encoder.vision_projector): use the preprocessor_config.json of the "
                "model"
            )
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Raise ConfigError where a tile would have another size than the encoder takes."""
        processor, side = self.processor, self.side
        found = processor.size if processor.do_resize else {}
        found = found | (
            {f"crop {key}": value for key, value in processor.crop_size.items()} if processor.do_center_crop else {}
        )
        wrong = {key: value for key, value in found.items() if value != side}
        if wrong:
            raise ConfigError(
                f"the image processor has {', '.join(f'{key} {value}' for key, value in wrong.items())}; the vision "
                f"encoder takes tiles of {side} x {side} (image_encoder.vision_encoder.image_size): use the "
                "preprocessor_config.json of the model"
            )

    @property
    def fixed(self) -> None:
        return None

    def plan(self, height: int, width: int) -> ItemPlan:
        grid = tile_grid((height, width), self.pinpoints, self.side)
        count = tile_features((height, width), grid, self.patches, self.merge)
        return ItemPlan((1, *grid), (IMAGE_TOKEN_INDEX,) * count)

    def item(self, image: Any) -> Media:
        loaded = as_rgb(image)
        check_pixels(loaded, image if not isinstance(image, Image.Image) else "(in memory)")
        size = (loaded.height, loaded.width)
        target = best_resolution(size, self.pinpoints)
        larger, side = self._resize(loaded, resized_size(size, target)), self.side
        canvas = Image.new("RGB", (target[1], target[0]))
        canvas.paste(larger, ((target[1] - larger.width) // 2, (target[0] - larger.height) // 2))
        corners = [(left, top) for top in range(0, target[0], side) for left in range(0, target[1], side)]
        tiles = [canvas.crop((left, top, left + side, top + side)) for left, top in corners]
        pixels = [
            preprocess_image(tile, self.processor, pad=False) for tile in (self._resize(loaded, (side, side)), *tiles)
        ]
        return Media(
            torch.stack(pixels),
            (len(pixels),),
            torch.tensor([[1, target[0] // side, target[1] // side]]),
            torch.tensor([size]),
        )

    def _resize(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """To (height, width)."""
        return resized(image, (size[1], size[0]), self.processor.resample, fast=self.fast_resize)

    @property
    def config(self) -> dict[str, Any]:
        fields = self.processor.model_dump(mode="json")
        own = {"image_grid_pinpoints": [list(pair) for pair in self.pinpoints], "do_pad": True}
        return {"image_processor_type": TILE_TYPES[0], **fields, **own}

    @property
    def settings(self) -> dict[str, Any]:
        sizes = {"patches": self.patches, "side": self.side, "merge": self.merge}
        return {"processor": self.config, **sizes, "fast_resize": self.fast_resize}


def _read(source: dict[str, Any] | str | Path) -> tuple[ImageProcessor, list[Any] | None]:
    """(the processor of a tile, pinpoints where the config has them)."""
    if not isinstance(source, dict):
        path = config_file(Path(source))
        source = read_json(path)
        source = source.get("image_processor", source) if path.name == CONFIG_NAMES[1] else source
    if source.get("image_processor_type") not in TILE_TYPES:
        processor = ImageProcessor.from_config(source)
        if processor.do_pad:
            raise ConfigError(
                "the image processor pads images to squares (do_pad), as LLaVA-1.5 does; this model takes tiles: use "
                "its own preprocessor_config.json"
            )
        return processor, None
    fields = {key: value for key, value in source.items() if key not in (*OWN_KEYS, "image_processor_type")}
    pinpoints = source.get("image_grid_pinpoints")
    if pinpoints is not None and not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pinpoints):
        raise ConfigError(f"image processor: image_grid_pinpoints is {_short(pinpoints)}; expected pairs of pixels.")
    return ImageProcessor.from_config(fields), pinpoints


def _short(pinpoints: Sequence[Any]) -> str:
    shown = ", ".join(str(list(pair) if isinstance(pair, tuple) else pair) for pair in pinpoints[:6])
    return f"[{shown}{', ...' if len(pinpoints) > 6 else ''}]"
