"""Images and videos on their way into the model: what their sizes alone say, and their pixels.

A placeholder is IMAGE_TOKEN_INDEX and means: a feature goes here. How many an item has follows from its size, so that
lengths, packing and plans are known without decoding an image. Tags around them are ordinary tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
from mindspeed_mm.data.image import ImageError, ImageProcessor, preprocess
from mindspeed_mm.data.sample import VideoFrames
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.media import Media


@dataclass(frozen=True)
class ItemPlan:
    """What the size of an item says about it."""

    grid: tuple[int, int, int]
    """Time, height and width in the processor's units (see models.media.Media)."""

    ids: tuple[int, ...]
    """The tokens in the place of the item's single placeholder: IMAGE_TOKEN_INDEX for every feature, and tags."""

    @cached_property
    def count(self) -> int:
        """Features of the item."""
        return self.ids.count(IMAGE_TOKEN_INDEX)

    @property
    def ids_key(self) -> list[int]:
        """[features, *tags], which two plans of one length have in common only if they are equal, for fingerprints."""
        return [self.count, *(token for token in self.ids if token != IMAGE_TOKEN_INDEX)]


def tagged(count: int, tags: Sequence[int] | None) -> tuple[int, ...]:
    """Placeholders of `count` features between the two tokens `tags`; None: nothing stands around them."""
    features = (IMAGE_TOKEN_INDEX,) * count
    return features if tags is None else (tags[0], *features, tags[1])


class MediaProcessor(ABC):
    """How one model makes pixels and placeholders of an image. Made by a family, from its spec and processor config."""

    @property
    @abstractmethod
    def fixed(self) -> ItemPlan | None:
        """The plan that every image has, whatever its size; None where the size decides."""

    @abstractmethod
    def plan(self, height: int, width: int) -> ItemPlan:
        """The plan of an image of this size.

        Raises:
            ImageError: an image of this size cannot be used (its aspect ratio is too extreme).
        """

    @abstractmethod
    def item(self, image: Any) -> Media:
        """One decoded or encoded image (a path, PIL image or ImageBytes) as media of one item.

        Raises:
            ImageError: the image cannot be used.
        """

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The preprocessor_config.json that it follows; a family's `media_processor` takes it again."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """JSON values of everything that plans and pixels depend on, for fingerprints of caches and checkpoints."""

    takes_videos = False
    """Whether an item may be a sample.VideoFrames."""

    reads_instructions = False
    """Whether the model's projector reads the question about an image."""

    def instruction(self, text: str) -> tuple[int, ...]:
        """The question about an image in the tokens of the projector, of a model that reads it.

        Raises:
            DataError: a text that the projector cannot take.
        """
        raise NotImplementedError("this model's projector reads no question")

    def batch(self, items: Sequence[Media]) -> Media | None:
        """Several items as one; None where there is none."""
        return Media.join(items) if items else None


class FixedSizeImages(MediaProcessor):
    """Images of one size, each with the same number of features (LLaVA-1.5)."""

    def __init__(
        self,
        processor: ImageProcessor,
        count: int,
        *,
        tags: Sequence[int] | None = None,
        pad: bool = False,
        fast_resize: bool = False,
    ) -> None:
        """`count` features an image, between the two tokens `tags`; see data.image.preprocess for the rest.

        Raises ConfigError for a processor whose images have no size of their own.
        """
        if processor.output_size is None:
            raise ConfigError(
                "the image processor gives images of different sizes (no centre crop); a batch needs one size. Set "
                "do_center_crop, or a size with height and width."
            )
        self.processor, self.pad, self.fast_resize = processor, pad, fast_resize
        self._plan = ItemPlan((1, 1, 1), tagged(count, tags))

    @property
    def fixed(self) -> ItemPlan:
        return self._plan

    def plan(self, height: int, width: int) -> ItemPlan:
        return self._plan

    def item(self, image: Any) -> Media:
        return Media.of_images(preprocess(image, self.processor, self.pad, fast=self.fast_resize).unsqueeze(0))

    @property
    def config(self) -> dict[str, Any]:
        return self.processor.model_dump(mode="json")

    @property
    def settings(self) -> dict[str, Any]:
        tags = [token for token in self._plan.ids if token != IMAGE_TOKEN_INDEX]
        own = {"processor": self.config, "pad": self.pad, "fast_resize": self.fast_resize, "count": self._plan.count}
        return own | ({"tags": tags} if tags else {})


class FramedImages(FixedSizeImages):
    """Images of one size, and videos, whose frames are such images."""

    takes_videos = True

    def __init__(self, processor: ImageProcessor, count: int, *, max_frames: int | None, fast_resize: bool) -> None:
        """`max_frames`: most frames of a video; None: any number. See FixedSizeImages for the rest."""
        super().__init__(processor, count, fast_resize=fast_resize)
        self.max_frames = max_frames

    def item(self, image: Any) -> Media:
        if not isinstance(image, VideoFrames):
            return super().item(image)
        frames = len(image.frames)
        if self.max_frames is not None and frames > self.max_frames:
            raise ImageError(
                f"found a video of {frames} frames ({image}); the model has embeddings for {self.max_frames}. Take "
                "fewer frames."
            )
        pixels = torch.cat([super(FramedImages, self).item(frame).pixels for frame in image.frames])
        return Media(pixels, (frames,), torch.tensor([[frames, 1, 1]]), torch.zeros(1, 2, dtype=torch.int64))
