"""Image features, computed once for each distinct picture."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import torch

from mindspeed_mm.data.image import ImageError, ImageProcessor, preprocess
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.generation.decode import Decoder

KEPT = 32
"""Pictures whose features are kept; 576 tokens of width 4096 take 4.5 MiB in bf16."""


class PictureFeatures:
    """Features of pictures for one decoder; the same pixels go through the tower once while they are remembered."""

    def __init__(self, decoder: Decoder, image_processor: ImageProcessor | None, *, pad: bool) -> None:
        self._decoder, self._processor, self._pad = decoder, image_processor, pad
        self._known: OrderedDict[bytes, torch.Tensor | None] = OrderedDict()
        self.computed = 0
        """Pictures that went through the tower so far."""

    def __call__(self, images: Sequence[Any]) -> list[torch.Tensor | None]:
        """Features of pictures (PIL pictures, files, encoded bytes, or preprocessed tensors [3, h, w]).

        Raises:
            ImageError: a picture cannot be used.
        """
        pixels = [self._pixels(image) for image in images]
        keys = [hashlib.blake2b(p.numpy(force=True).tobytes(), digest_size=16).digest() for p in pixels]
        new = {key: p for key, p in zip(keys, pixels, strict=True) if key not in self._known}
        found = dict(zip(new, self._decoder.image_features(list(new.values())), strict=True))
        self.computed += len(new)
        features = [found[key] if key in found else self._known[key] for key in keys]
        self._known.update(found)
        for key in keys:
            self._known.move_to_end(key)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return features

    def _pixels(self, image: Any) -> torch.Tensor:
        if isinstance(image, torch.Tensor):
            return image.float().contiguous()
        if self._processor is None:
            raise ConfigError("the model came with no image processor: load it with image_processor=FOLDER")
        if isinstance(image, str):
            refuse_url(image)
        pixels = preprocess(image, self._processor, pad=self._pad)
        size = self._decoder.vlm.spec.vision_encoder.image_size
        if pixels.shape[1:] != (size, size):
            raise ImageError(
                f"the image processor gives {pixels.shape[2]} x {pixels.shape[1]} pixels, the tower takes {size} x "
                f"{size}: use the preprocessor_config.json of the tower"
            )
        return pixels


def refuse_url(path: str) -> None:
    """Raise ImageError for an address: nothing is downloaded."""
    if urlsplit(path).scheme in ("http", "https", "ftp", "data", "s3"):
        raise ImageError(f"image {path[:80]} is an address, and nothing is downloaded: save the picture, give its path")
