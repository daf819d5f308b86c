"""Image features, computed once for each distinct image and for several requests at a time."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from PIL import Image

from mindspeed_mm.data.image import ImageError, as_rgb, image_size, load_image
from mindspeed_mm.data.media import ItemPlan, MediaProcessor
from mindspeed_mm.data.sample import ImageBytes
from mindspeed_mm.data.storage.objects import StoredImage, is_address
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.generation.decode import Decoder, ItemFeatures
from mindspeed_mm.models.media import Media
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
    source: Media | torch.Tensor | Image.Image | ImageBytes
    plan: ItemPlan
    """What its size says."""
    instruction: tuple[int, ...] = ()
    """The question about it, for a projector that reads it."""

    def asked(self, instruction: tuple[int, ...]) -> FoundImage:
        """The same with a question, on which its features depend."""
        key = _digest(self.key, repr(instruction).encode())
        return self._replace(key=key, instruction=instruction)


class ImageFeatures:
    """Features of images for one decoder; equal images go through the vision encoder once while they are remembered."""

    def __init__(self, decoder: Decoder, media: MediaProcessor | None) -> None:
        """`media` None: the model came without an image processor and takes preprocessed images alone."""
        self._decoder, self.media = decoder, media
        spec = decoder.vlm.spec
        self.fixed = media.fixed if media is not None else spec.family.fixed_plan(spec)
        """The plan that every image has; None where its size decides."""
        self._known: OrderedDict[bytes, ItemFeatures] = OrderedDict()
        self._kept: dict[bytes, int] = {}
        """Features of the known images."""
        self._most = KEPT_BYTES // decoder.feature_bytes
        self.computed = 0
        """Images that went through the vision encoder so far."""

    def find(self, images: Sequence[Any], instructions: Sequence[tuple[int, ...]] | None = None) -> list[FoundImage]:
        """Read images: PIL images, paths, encoded bytes (ImageBytes), preprocessed tensors [3, h, w], or an Image
        that was found already. `instructions`: the question about each, for a projector that reads it.

        Raises:
            ImageError: an image is missing, an address, or nothing that can be one.
        """
        found = [self._find(image) for image in images]
        if instructions is None:
            return found
        return [image.asked(ids) for image, ids in zip(found, instructions, strict=True)]

    def features(self, requests: Sequence[Sequence[FoundImage]]) -> list[list[ItemFeatures] | ImageError]:
        """For each of several requests the features of its images, or why one of them cannot be used.

        Images of all requests go through the vision encoder together. A request with an image that cannot be used costs
        no other one anything.
        """
        new: dict[bytes, tuple[Media, ItemPlan]] = {}
        errors: dict[int, ImageError] = {}
        for index, images in enumerate(requests):
            try:
                own = {
                    image.key: (self._item(image), image.plan)
                    for image in images
                    if image.key not in self._known and image.key not in new
                }
            except ImageError as error:
                errors[index] = error
                continue
            new |= own
        found = self._compute(new)
        answers = [
            errors.get(index) or [found[p.key] if p.key in found else self._known[p.key] for p in images]
            for index, images in enumerate(requests)
        ]
        self._remember(found, [image for images in requests for image in images])
        return answers

    def _compute(self, new: dict[bytes, tuple[Media, ItemPlan]]) -> dict[bytes, ItemFeatures]:
        found: dict[bytes, ItemFeatures] = {}
        sizes = {key: max(media.rows[0], plan.count) for key, (media, plan) in new.items()}
        for keys in _groups(sizes, current_platform().inference_tokens):
            items = self._decoder.image_features([new[key][0] for key in keys])
            found |= zip(keys, map(_of_its_own, items), strict=True)
        self.computed += len(new)
        return found

    def _remember(self, found: dict[bytes, ItemFeatures], used: Sequence[FoundImage]) -> None:
        self._known.update(found)
        for image in used:
            if image.key in self._known:
                self._known.move_to_end(image.key)
                self._kept[image.key] = image.plan.count
        total = sum(self._kept.values())
        while len(self._known) > VISION_ENCODER_BATCH and total > self._most:
            key, _ = self._known.popitem(last=False)
            total -= self._kept.pop(key)

    def _item(self, found: FoundImage) -> Media:
        media = self._pixels(found.source)
        return replace(media, instructions=(found.instruction,)) if found.instruction else media

    def _pixels(self, image: Media | torch.Tensor | Image.Image | ImageBytes) -> Media:
        if isinstance(image, Media):
            return image
        if isinstance(image, torch.Tensor):
            spec = self._decoder.vlm.spec
            try:
                return spec.family.media_of_inputs(spec, {"pixel_values": image[None]})
            except ConfigError as error:
                raise ImageError(f"a preprocessed image does not fit: {error}") from error
        return self._processor().item(image)

    def _processor(self) -> MediaProcessor:
        if self.media is None:
            raise ConfigError(
                "the model came with no image processor: give --image-processor FOLDER (image_processor=)"
            )
        return self.media

    def _find(self, image: Any) -> FoundImage:
        if isinstance(image, FoundImage):
            return image
        if isinstance(image, torch.Tensor):
            if self.fixed is None:
                raise ImageError(
                    "found a tensor as an image; this model takes images of any size: give the image itself"
                )
            image = image.float().contiguous()
            return FoundImage(_digest(image.numpy(force=True).tobytes()), image, self.fixed)
        if isinstance(image, Image.Image):
            image = as_rgb(image)
            return FoundImage(_digest(repr(image.size).encode(), image.tobytes()), image, self._plan(image))
        if isinstance(image, str | Path):
            image = _read(image)
        if not isinstance(image, ImageBytes):
            raise ImageError(
                f"found a {type(image).__name__} as an image; expected a path, a PIL image, ImageBytes or a tensor"
            )
        return FoundImage(_digest(image.data), image, self._plan(image))

    def _plan(self, image: Image.Image | ImageBytes) -> ItemPlan:
        if self.fixed is not None:
            return self.fixed
        height, width = image_size(image)
        if not height or not width:
            raise ImageError(f"an image is {width} x {height} pixels, which is none; replace it")
        return self._processor().plan(height, width)


def _of_its_own(item: ItemFeatures) -> ItemFeatures:
    """Features that do not keep those of the images beside it in memory, as views of one tensor would."""
    return ItemFeatures(*(None if values is None else values.clone() for values in item))


def _groups(sizes: dict[bytes, int], most: int) -> Iterator[list[bytes]]:
    """Keys of images that go through the vision encoder together: at most VISION_ENCODER_BATCH of `most` in size.

    The size of an image is its features or its rows of pixels, whichever are more: an encoder that merges patches has
    more rows than features, one that cuts images into tiles has fewer.
    """
    group: list[bytes] = []
    total = 0
    for key, size in sizes.items():
        if group and (len(group) == VISION_ENCODER_BATCH or total + size > most):
            yield group
            group, total = [], 0
        group.append(key)
        total += size
    if group:
        yield group


def _read(path: str | Path) -> ImageBytes:
    refuse_url(str(path))
    if is_address(path):
        return _from_store(StoredImage(str(path)))
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


def _from_store(image: StoredImage) -> ImageBytes:
    try:
        return ImageBytes(str(image), image.read())
    except FileNotFoundError as error:
        raise ImageError(f"image {error}; correct the address") from error


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()


def refuse_url(path: str) -> None:
    """Raise ImageError for an address of the net: nothing is downloaded from there."""
    if urlsplit(path).scheme in ("http", "https", "ftp", "data"):
        raise ImageError(f"image {path[:80]} is an address, and nothing is downloaded: save the image, give its path")
