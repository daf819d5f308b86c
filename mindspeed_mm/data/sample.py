"""The forms a training sample takes on its way from a record to the model."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch

from mindspeed_mm.models.media import Features, Media


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation, in LLaVA's role names; a system turn only comes first."""

    role: Literal["human", "gpt", "system"]
    text: str
    """`<image>` stands for an image, except at the places in `literal`."""

    literal: tuple[int, ...] = ()
    """Where in the text `<image>` begins that is meant as these seven characters."""

    learned: bool = True
    """Of an answer: whether it is supervised; false where the data marks it so."""


class EncodedImage(Protocol):
    """An encoded image that is no file of its own."""

    @property
    def size(self) -> int:
        """Number of its bytes."""
        ...

    def read(self) -> bytes:
        """Its bytes."""
        ...


@dataclass(frozen=True)
class ImageBytes:
    """An encoded image in memory (a value of a parquet file, an upload)."""

    name: str
    """For messages."""
    data: bytes

    def __str__(self) -> str:
        return self.name

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self) -> bytes:
        return self.data


@dataclass(frozen=True)
class ImageMember:
    """An encoded image inside a larger file (a member of a tar file); read when it is needed."""

    name: str
    """For messages."""
    file: Path
    place: int
    """Byte of the file at which it begins."""
    size: int

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        """Raises OSError where the file has become shorter."""
        with self.file.open("rb") as file:
            content = os.pread(file.fileno(), self.size, self.place)
        if len(content) != self.size:
            raise OSError(f"{self.file} ends within it; the file has changed since it was indexed")
        return content


@dataclass(frozen=True)
class VideoFrames:
    """Frames of a video, which have one `<image>` together; for models that take videos so."""

    frames: tuple[str | EncodedImage, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.frames))


@dataclass(frozen=True)
class Sample:
    """A record that was read and checked; images are not decoded yet."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str | EncodedImage | VideoFrames, ...]
    """Paths, or images inside of other files."""

    where: str
    """File and record number, for messages."""

    rejected: tuple[Turn, ...] | None = None
    """Preference records: the conversation with the worse answer (`turns` has the better one)."""

    ignored: tuple[str, ...] = ()
    """Keys of the record and its turns that nothing reads."""

    @property
    def files(self) -> list[str | EncodedImage]:
        """The images, each frame by itself."""
        return [file for each in self.images for file in (each.frames if isinstance(each, VideoFrames) else (each,))]


@dataclass(frozen=True)
class CachedImage:
    """One image of a sample, as a feature cache sees it."""

    key: str
    """Its name there."""

    values: torch.Tensor | None
    """[features, Hv]; None where they are not stored yet."""


@dataclass(frozen=True)
class Encoded:
    """One sample as the model will see it: every image is expanded to its number of image tokens."""

    sample_id: str
    input_ids: list[int]
    """IMAGE_TOKEN_INDEX (-200) at image positions."""

    labels: list[int]
    """The token at each position where it is supervised, else IGNORE_INDEX (-100). Not shifted."""

    media: tuple[Media, ...] = ()
    """The images in reading order, each as media of one item."""

    skipped: tuple[str, ...] = ()
    """Why records before this one were left out (image_error policy "skip"); empty otherwise."""

    features: tuple[CachedImage, ...] = ()
    """With a feature cache: an entry for each image. `media` then holds only those whose features are not known."""

    positions: torch.Tensor | None = None
    """[3, length] int64 of a family with multimodal positions; None: 0, 1, 2, ..."""

    branches: tuple[int, int, int] | None = None
    """Of a preference record (data/pairs.py): lengths of the shared beginning, the chosen and the rejected end."""

    pair_key: bytes | None = None
    """Name of a preference record in a store of log-probabilities (data/reference_store.py), where one is used."""


@dataclass(frozen=True)
class CachedImages:
    """What a feature cache knows of the N images of a batch."""

    keys: tuple[str, ...]
    """[N] names in the cache."""

    known: tuple[bool, ...]
    """[N] whether the features are here."""

    features: torch.Tensor
    """[F, Hv] of the known ones, in reading order."""


@dataclass(frozen=True)
class Batch:
    """A right-padded micro-batch. B: rows (samples, unless packed), S: length, N: images of the whole batch."""

    input_ids: torch.Tensor
    """[B, S] int64; -200 at image positions, the pad id behind a sample's end."""

    labels: torch.Tensor
    """[B, S] int64; the NEXT token at each position (already shifted), -100 where nothing is predicted."""

    position_ids: torch.Tensor
    """[B, S] int64; 0, 1, 2, ... in every row; packed: from 0 again at the start of each sample. [3, B, S] (time,
    height, width) for a family with multimodal positions."""

    media: Media | None
    """All images in reading order; None for a text-only batch. Only the unknown ones of `cached`."""

    sample_ids: list[str]
    """Without those of conversations that go beside pairs."""

    tokens: int
    """Positions that hold a sample, padding not counted."""

    supervised: int
    """Positions with a label."""

    lengths: tuple[int, ...] = ()
    """Positions of each sample; their sum is `tokens`."""

    skipped: tuple[str, ...] = ()
    """Why records were left out while these samples were fetched, one entry per record."""

    segment_ids: torch.Tensor | None = None
    """[B, S] int64 of packed rows: 1, 2, ... for the samples of a row, 0 for padding. Attention stays inside a segment.
    None: one sample a row, causal attention is right."""

    cached: CachedImages | None = None
    """Which features of the images are known; None: no feature cache, or no images."""

    branches: tuple[tuple[int, ...], ...] | None = None
    """Of preference records, for each sample: as in Encoded, or its length alone where it is a conversation that goes
    beside the pairs (data/auxiliary.py). None: conversations."""

    reference: torch.Tensor | None = None
    """[pairs, 2] float32: log-probabilities of the chosen and the rejected answers under the reference model."""

    pair_keys: tuple[bytes, ...] | None = None
    """[pairs] as in Encoded; None: no store is used."""

    encoded: Features | None = None
    """Of all images, on the device, where several passes share what the vision encoder gives."""

    @property
    def num_images(self) -> int:
        """Images of the batch, with features or pixels."""
        return self.num_encoded if self.cached is None else len(self.cached.keys)

    @property
    def num_encoded(self) -> int:
        """Images that the vision encoder runs on."""
        return 0 if self.media is None else len(self.media)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory (DataLoader calls this under pin_memory)."""
        names = ["input_ids", "labels", "position_ids"]
        names += [name for name in ("segment_ids", "media", "reference") if getattr(self, name) is not None]
        pinned = {name: getattr(self, name).pin_memory() for name in names}
        if self.cached is not None:
            pinned["cached"] = replace(self.cached, features=self.cached.features.pin_memory())
        return replace(self, **pinned)
