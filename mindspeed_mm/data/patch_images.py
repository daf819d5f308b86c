"""Images of any size as patches (Qwen2-VL, Qwen2.5-VL): each image keeps its shape, as far as whole patches allow.

Equal to transformers' Qwen2VLImageProcessor (its Pillow backend). Tokens around an image belong to the plan.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mindspeed_mm.config.load import read_json
from mindspeed_mm.data.image import (
    CONFIG_NAMES,
    MAX_PIXELS,
    ImageError,
    ImageProcessor,
    as_rgb,
    check_pixels,
    config_file,
    preprocess,
    resized,
)
from mindspeed_mm.data.media import ItemPlan, MediaProcessor, tagged
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.media import Media

PATCH_TYPES = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
"""Names under which transformers saves the processor that makes patches."""

SIZE = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
"""Fewest and most pixels, where a config says nothing: transformers' defaults."""

MOST_RATIO = 200
"""Longer side over shorter side that transformers' processor takes at most."""

PATCH_KEYS = ("patch_size", "temporal_patch_size", "merge_size")
OWN_KEYS = ("image_processor_type", "size", "min_pixels", "max_pixels", "do_center_crop", *PATCH_KEYS)
"""Keys that are read here; the rest are those of CLIP's processor."""


class PatchImages(MediaProcessor):
    """Images resized to whole patches within a number of pixels, and cut into them."""

    def __init__(
        self,
        source: dict[str, Any] | str | Path,
        *,
        patch: int,
        frames: int,
        merge: int,
        tags: tuple[int, int] | None = None,
        fast_resize: bool = False,
    ) -> None:
        """
        Args:
            source: a preprocessor_config.json of transformers' Qwen2VLImageProcessor: its content, the file or its
                folder.
            patch, frames, merge: side of a patch, frames in it, and patches along a side that become one feature, as
                the vision encoder has them.
            tags: tokens before and behind the features of an image; None: none.
            fast_resize: resize with torch's kernel.

        Raises:
            ConfigError: a processor of another family, or other patches.
        """
        fields, where = _read(source)
        wrong = {
            key: (fields.get(key, default), own)
            for key, default, own in zip(PATCH_KEYS, (14, 2, 2), (patch, frames, merge), strict=True)
            if fields.get(key, default) != own
        }
        if wrong:
            listed = ", ".join(f"{key} {found} (the model: {own})" for key, (found, own) in wrong.items())
            raise ConfigError(
                f"image processor ({where}): found {listed}; expected what the vision encoder has. Use the "
                "preprocessor_config.json of the model."
            )
        self.least, self.most = _pixels(fields, where)
        plain = {key: value for key, value in fields.items() if key not in OWN_KEYS}
        # Resizing and cropping happen here, the rest as for CLIP.
        self._values = ImageProcessor.from_config(plain | {"do_resize": False, "do_center_crop": False})
        if not fields.get("do_resize", True) or fields.get("do_center_crop", False) or self._values.do_pad:
            raise ConfigError(
                f"image processor ({where}): found do_resize {fields.get('do_resize', True)}, do_center_crop "
                f"{fields.get('do_center_crop', False)} and do_pad {self._values.do_pad}; expected images that are "
                "resized to whole patches and neither cropped nor padded."
            )
        self.patch, self.frames, self.merge, self.tags, self.fast_resize = patch, frames, merge, tags, fast_resize

    @property
    def fixed(self) -> None:
        return None

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image of this size is resized to: multiples of a merged patch, and as many pixels as
        allowed, at about its aspect ratio (the rule of Qwen2-VL's smart_resize).

        Raises ImageError for an image that is too long and narrow, or that `min_pixels` blows up beyond all bounds.
        """
        if min(height, width) < 1 or max(height, width) > MOST_RATIO * min(height, width):
            raise ImageError(
                f"is {width} x {height} pixels; expected sides of a ratio of at most {MOST_RATIO}. Crop it, or remove "
                "the record."
            )
        unit = self.patch * self.merge
        rows, columns = (round(side / unit) * unit for side in (height, width))
        if rows * columns > self.most:
            shrink = math.sqrt(height * width / self.most)
            rows, columns = (max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width))
        elif rows * columns < self.least:
            grow = math.sqrt(self.least / (height * width))
            rows, columns = (math.ceil(side * grow / unit) * unit for side in (height, width))
        if rows * columns > MAX_PIXELS:
            raise ImageError(
                f"is {width} x {height} pixels, {rows * columns} when resized; at most {MAX_PIXELS} are taken. Lower "
                "size.longest_edge of the image processor."
            )
        return rows, columns

    def plan(self, height: int, width: int) -> ItemPlan:
        rows, columns = (side // self.patch for side in self.resized_size(height, width))
        return ItemPlan((1, rows, columns), tagged(rows * columns // self.merge**2, self.tags))

    def item(self, image: Any) -> Media:
        loaded = as_rgb(image)
        name = image if not isinstance(image, Image.Image) else "(in memory)"
        check_pixels(loaded, name)
        try:
            height, width = self.resized_size(loaded.height, loaded.width)
        except ImageError as error:
            raise ImageError(f"image {name} {error}") from error
        whole = resized(loaded, (width, height), self._values.resample, fast=self.fast_resize)
        pixels = preprocess(whole, self._values, pad=False)
        return Media(
            self._patches(pixels),
            (height * width // self.patch**2,),
            torch.tensor([[1, height // self.patch, width // self.patch]]),
            torch.zeros(1, 2, dtype=torch.int64),
        )

    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """[3, h, w] -> [patches, 3 * frames * patch * patch]; patches that become one feature stand together, and an
        image is its own frames."""
        channels, height, width = pixels.shape
        patch, merge = self.patch, self.merge
        rows, columns = height // (patch * merge), width // (patch * merge)
        cut = pixels.view(channels, rows, merge, patch, columns, merge, patch).permute(1, 4, 2, 5, 0, 3, 6)
        cut = cut.unsqueeze(5).expand(*cut.shape[:5], self.frames, *cut.shape[5:])
        return cut.reshape(rows * columns * merge**2, channels * self.frames * patch**2)

    @property
    def config(self) -> dict[str, Any]:
        fields = self._values.model_dump(mode="json", exclude={"do_pad", "do_center_crop", "crop_size", "size"})
        own = {"patch_size": self.patch, "temporal_patch_size": self.frames, "merge_size": self.merge}
        sizes = {"size": {"shortest_edge": self.least, "longest_edge": self.most}}
        return {"image_processor_type": PATCH_TYPES[0], **fields, "do_resize": True, **sizes, **own}

    @property
    def settings(self) -> dict[str, Any]:
        return {"processor": self.config, "tags": self.tags, "fast_resize": self.fast_resize}


def _read(source: dict[str, Any] | str | Path) -> tuple[dict[str, Any], str]:
    """(fields of a processor that makes patches, where they are from)."""
    where = "given fields"
    if not isinstance(source, dict):
        path = config_file(Path(source))
        source, where = read_json(path), str(path)
        source = source.get("image_processor", source) if path.name == CONFIG_NAMES[1] else source
    kind = source.get("image_processor_type", source.get("feature_extractor_type"))
    if kind not in PATCH_TYPES:
        raise ConfigError(
            f'image processor ({where}): image_processor_type is "{kind}"; expected {PATCH_TYPES[0]}, which makes the '
            "patches that this model takes. Use the model's own preprocessor_config.json."
        )
    return dict(source), where


def _pixels(fields: dict[str, Any], where: str) -> tuple[int, int]:
    """(fewest, most) pixels of a resized image; the old keys come first, as in transformers."""
    size = fields.get("size") or SIZE
    least, most = fields.get("min_pixels"), fields.get("max_pixels")
    least = size.get("shortest_edge", size.get("min_pixels")) if least is None else least
    most = size.get("longest_edge", size.get("max_pixels")) if most is None else most
    if type(least) is not int or type(most) is not int or not 0 < least <= most:
        raise ConfigError(
            f"image processor ({where}): found {least!r} as fewest and {most!r} as most pixels; expected "
            'positive integers in this order, as size {"shortest_edge": ..., "longest_edge": ...}.'
        )
    return least, most
