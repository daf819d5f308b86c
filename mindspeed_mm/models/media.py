"""What goes into a vision encoder and what comes out: media of any size, features of any count.

An item is an image or a video. Everything that is known of an item from its size alone lies in host memory, so that
nothing waits for the device to learn a shape.

Legend: I items, R rows of pixels, F features, Hv width of the encoder, H width of the decoder.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch


@dataclass(frozen=True)
class Media:
    """The items of a micro-batch in reading order, their pixels one behind the other."""

    pixels: torch.Tensor
    """[R, ...] float, as the vision encoder takes them: images or tiles of one size [R, 3, h, w], or patches [R, C]."""

    rows: tuple[int, ...]
    """[I] rows of `pixels` of each item."""

    grid: torch.Tensor
    """[I, 3] int64 in host memory: time, height and width of each item in the processor's units (tiles, patches)."""

    sizes: torch.Tensor
    """[I, 2] int64 in host memory: height and width of each image before processing; 0 where nobody asks for them."""

    instructions: tuple[tuple[int, ...], ...] = ()
    """[I] ids of the question about each item, of models whose projector reads it (InstructBLIP); () for all others."""

    @classmethod
    def of_images(cls, pixels: torch.Tensor) -> Media:
        """Images of one size, [I, 3, h, w], one row each."""
        items = pixels.shape[0]
        return cls(pixels, (1,) * items, torch.ones(items, 3, dtype=torch.int64), torch.zeros(items, 2).long())

    @classmethod
    def join(cls, parts: Sequence[Media]) -> Media:
        """The items of several media, which must be of one kind; at least one."""
        return cls(
            torch.cat([part.pixels for part in parts]),
            tuple(itertools.chain.from_iterable(part.rows for part in parts)),
            torch.cat([part.grid for part in parts]),
            torch.cat([part.sizes for part in parts]),
            tuple(itertools.chain.from_iterable(part.instructions for part in parts)),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> Media:
        """The same with its pixels on a device, where they go without waiting; the rest stays in host memory."""
        return replace(self, pixels=self.pixels.to(device, non_blocking=True))

    def pin_memory(self) -> Media:
        """The same with its pixels in page-locked memory."""
        return replace(self, pixels=self.pixels.pin_memory())


@dataclass(frozen=True)
class Features:
    """What an encoder or a projector gives: the features of all items one behind the other."""

    values: torch.Tensor
    """[F, Hv] of an encoder, [F, H] of a projector."""

    counts: tuple[int, ...]
    """[I] features of each item; their sum is F."""

    media: Media
    """What they were made of. Its pixels may be empty where the features come from a cache."""

    def of(self, values: torch.Tensor) -> Features:
        """As many other values for each item."""
        return replace(self, values=values)


def fixed_size_features(values: torch.Tensor, media: Media) -> Features:
    """Features of an encoder that gives equally many for each row of pixels, [R, P, Hv]."""
    return Features(values.flatten(0, 1), tuple(values.shape[1] * rows for rows in media.rows), media)


class VisionEncoder(Protocol):
    """What a part of slot vision_encoder builds."""

    def __call__(self, media: Media) -> Features: ...

    def blank(self) -> Media:
        """The smallest item there is, all zeros, on the device and in the type of the weights."""
        ...

    def blank_features(self) -> Features:
        """Zeros in the place of the features of `blank`, for a frozen encoder."""
        ...


class VisionProjector(Protocol):
    """What a part of slot vision_projector builds."""

    def __call__(self, features: Features) -> Features: ...
