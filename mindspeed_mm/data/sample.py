"""The forms a training sample takes on its way from a record to the model."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation, in LLaVA's role names."""

    role: Literal["human", "gpt"]
    text: str


@dataclass(frozen=True)
class Sample:
    """A record that was read and checked; images are paths and not opened yet."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Path, ...]
    where: str
    """File and record number, for messages."""


@dataclass(frozen=True)
class Encoded:
    """One sample as the model will see it: every image is expanded to its number of image tokens."""

    sample_id: str
    input_ids: list[int]
    """IMAGE_TOKEN_INDEX (-200) at image positions."""

    labels: list[int]
    """The token at each position where it is supervised, else IGNORE_INDEX (-100). Not shifted."""

    images: tuple[torch.Tensor, ...] = ()
    """Preprocessed images, each [3, H, W] float32, in reading order."""

    skipped: tuple[str, ...] = ()
    """Why records before this one were left out (image_error policy "skip"); empty otherwise."""


@dataclass(frozen=True)
class Batch:
    """A right-padded micro-batch. B: samples, S: length, N: images of the whole batch."""

    input_ids: torch.Tensor
    """[B, S] int64; -200 at image positions, the pad id behind a sample's end."""

    labels: torch.Tensor
    """[B, S] int64; the NEXT token at each position (already shifted), -100 where nothing is predicted."""

    position_ids: torch.Tensor
    """[B, S] int64; 0, 1, 2, ... in every row."""

    pixel_values: torch.Tensor
    """[N, 3, H, W] float32 in reading order; N is 0 for a text-only batch."""

    sample_ids: list[str]
    tokens: int
    """Positions that hold a sample, padding not counted."""

    supervised: int
    """Positions with a label."""

    lengths: tuple[int, ...] = ()
    """Positions of each row that hold the sample; their sum is `tokens`."""

    skipped: tuple[str, ...] = ()
    """Why records were left out while these samples were fetched, one entry per record."""

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory (DataLoader calls this under pin_memory)."""
        names = ("input_ids", "labels", "position_ids", "pixel_values")
        return replace(self, **{name: getattr(self, name).pin_memory() for name in names})
