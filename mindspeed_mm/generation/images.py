"""Image features, computed once for each distinct image and for several requests at a time."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from PIL import Image

from mindspeed_mm.data.image import MAX_PIXELS, ImageError, ImageProcessor, load_image, preprocess
from mindspeed_mm.data.sample import ImageBytes
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.generation.decode import Decoder
from mindspeed_mm.platform import current_platform

VISION_ENCODER_BATCH = 16
"""Images that go through the vision encoder together at most, which bounds the memory for its activations."""

KEPT_BYTES = 2**29
"""Features that are remembered; an image's 576 tokens of width 4096 take 4.5 MiB in bf16."""

MAX_FILE_BYTES = 2**30
"""Larger files are no images of at most MAX_PIXELS."""

DIGEST_BYTES = 16


class FoundImage(NamedTuple):
    """An image that was found and not decoded yet."""

    key: bytes
    """Digest of the content: of the file's bytes, else of the pixels."""
    source: torch.Tensor | Image.Image | ImageBytes


class ImageFeatures:
    """Features of images for one decoder; equal images go through the vision encoder once while they are remembered."""

    def __init__(self, decoder: Decoder, image_processor: ImageProcessor | None, *, pad: bool) -> None:
        self._decoder, self._processor, self._pad = decoder, image_processor, pad
        self._known: OrderedDict[bytes, torch.Tensor | None] = OrderedDict()
        self._batch = max(1, min(VISION_ENCODER_BATCH, current_platform().inference_tokens // decoder.tokens_per_image))
        self._kept = max(VISION_ENCODER_BATCH, KEPT_BYTES // decoder.image_bytes)
        self.computed = 0
        """Images that went through the vision encoder so far."""

    def find(self, images: Sequence[Any]) -> list[FoundImage]:
        """Read images: PIL images, paths, encoded bytes (ImageBytes), preprocessed tensors [3, h, w], or an Image
        that was found already.

        Raises:
            ImageError: an image is missing, an address, or nothing that can be one.
        """
        return [_find(image) for image in images]

    def features(self, requests: Sequence[Sequence[FoundImage]]) -> list[list[torch.Tensor | None] | ImageError]:
        """For each of several requests the features of its images, or why one of them cannot be used.

        Images of all requests go through the vision encoder together. A request with an image that cannot be used costs
        no other one anything.
        """
        new: dict[bytes, torch.Tensor] = {}
        errors: dict[int, ImageError] = {}
        for index, images in enumerate(requests):
            try:
                own = {p.key: self._pixels(p.source) for p in images if p.key not in self._known and p.key not in new}
            except ImageError as error:
                errors[index] = error
                continue
            new |= own
        found = self._compute(new)
        answers = [
            errors.get(index) or [found[p.key] if p.key in found else self._known[p.key] for p in images]
            for index, images in enumerate(requests)
        ]
        self._remember(found, [p.key for images in requests for p in images])
        return answers

    def _compute(self, new: dict[bytes, torch.Tensor]) -> dict[bytes, torch.Tensor | None]:
        pixels = list(new.values())
        features: list[torch.Tensor | None] = []
        for start in range(0, len(pixels), self._batch):
            features += self._decoder.image_features(pixels[start : start + self._batch])
        self.computed += len(pixels)
        return dict(zip(new, features, strict=True))

    def _remember(self, found: dict[bytes, torch.Tensor | None], used: Sequence[bytes]) -> None:
        self._known.update(found)
        for key in used:
            if key in self._known:
                self._known.move_to_end(key)
        while len(self._known) > self._kept:
            self._known.popitem(last=False)

    def _pixels(self, image: torch.Tensor | Image.Image | ImageBytes) -> torch.Tensor:
        size = self._decoder.vlm.spec.vision_encoder.image_size
        if isinstance(image, torch.Tensor):
            if image.shape != (3, size, size):
                raise ImageError(f"found an image of shape {list(image.shape)}; expected [3, {size}, {size}]")
            return image
        if self._processor is None:
            raise ConfigError("the model came with no image processor: load it with image_processor=FOLDER")
        pixels = preprocess(image, self._processor, pad=self._pad)
        if pixels.shape[1:] != (size, size):
            raise ImageError(
                f"the image processor gives {pixels.shape[2]} x {pixels.shape[1]} pixels, the vision encoder takes "
                f"{size} x {size}: use the preprocessor_config.json of the vision encoder"
            )
        return pixels


def _find(image: Any) -> FoundImage:
    if isinstance(image, FoundImage):
        return image
    if isinstance(image, torch.Tensor):
        image = image.float().contiguous()
        return FoundImage(_digest(image.numpy(force=True).tobytes()), image)
    if isinstance(image, Image.Image):
        image = _as_rgb(image)
        return FoundImage(_digest(repr(image.size).encode(), image.tobytes()), image)
    if isinstance(image, str | Path):
        image = _read(image)
    if not isinstance(image, ImageBytes):
        raise ImageError(
            f"found a {type(image).__name__} as an image; expected a path, a PIL image, ImageBytes or a tensor"
        )
    return FoundImage(_digest(image.data), image)


def _as_rgb(image: Image.Image) -> Image.Image:
    """The pixels of a PIL image, whose file may not have been read yet."""
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"an image is {image.width} x {image.height} pixels; at most {MAX_PIXELS} are taken: scale it")
    try:
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(f"an image in memory cannot be decoded ({error}); expected a whole one") from error


def _read(path: str | Path) -> ImageBytes:
    refuse_url(str(path))
    file = Path(path)
    if not file.exists():
        load_image(path)  # raises, and names a file with another suffix
    if not file.is_file():
        raise ImageError(f"image {path} is no file; expected an image")
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ImageError(f"image {path} has more than {MAX_FILE_BYTES} bytes: scale it down")
        return ImageBytes(str(path), file.read_bytes())
    except OSError as error:
        raise ImageError(f"image {path} cannot be read ({error.strerror}); correct its permissions") from error


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()


def refuse_url(path: str) -> None:
    """Raise ImageError for an address: nothing is downloaded."""
    if urlsplit(path).scheme in ("http", "https", "ftp", "data", "s3"):
        raise ImageError(f"image {path[:80]} is an address, and nothing is downloaded: save the image, give its path")
