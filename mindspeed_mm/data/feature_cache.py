"""Features of images on disk, for a vision encoder that is not trained: later epochs neither decode an image nor encode
it.

A file holds the features of one image. Its name is the SHA-256 of the image's encoded bytes, the name of its folder
that of everything else which the features depend on (`fingerprint`). Files are written beside, renamed and never
changed, so that any number of workers, ranks and runs share a folder. Nothing is evicted: an epoch reads every image
once, and whatever a full cache gave up for a new one would be missed just as much.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import uuid
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm.data.sample import EncodedImage

logger = logging.getLogger(__name__)

FORMAT = 1
"""Part of the fingerprint; another one leaves the files of before unread."""
CHECKSUM_BYTES = 4
UNFINISHED = ".unfinished"
ABANDONED_SECONDS = 3600.0
"""An unfinished file of this age is nobody's any more."""


def fingerprint(settings: dict[str, Any], weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hexadecimal SHA-256 of what features depend on beside the image.

    Args:
        settings: JSON values: the vision encoder's architecture, how pixels are made, precision, device.
        weights: the vision encoder's names and tensors.
    """
    digest = hashlib.sha256(json.dumps({"format": FORMAT} | settings, sort_keys=True).encode())
    for name, tensor in sorted(weights, key=lambda item: item[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Its content, whatever the dtype (numpy has no bfloat16)."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def used_bytes(folder: Path) -> int:
    """Size of all files below a cache's folder; what ended runs left unfinished is removed."""
    total = 0
    for path in folder.glob("*/*/*"):
        try:
            facts = path.stat()
            if path.suffix == UNFINISHED and time.time() - facts.st_mtime > ABANDONED_SECONDS:
                path.unlink()
                continue
        except FileNotFoundError:  # finished by its writer meanwhile
            continue
        total += facts.st_size
    return total


class FeatureCache:
    """The features that one vision encoder gives for one way of making pixels."""

    def __init__(self, folder: Path, name: str, shape: tuple[int, int], dtype: torch.dtype, room: float) -> None:
        """`folder`/`name` holds the files, `name` being a fingerprint; `shape` is [P, Hv]; `room` is how many bytes
        this process may write."""
        self._folder = folder / name
        self._shape, self._dtype, self._room = shape, dtype, room
        self._size = shape[0] * shape[1] * dtype.itemsize + CHECKSUM_BYTES
        self._told = False

    @staticmethod
    def key(image: str | Path | EncodedImage) -> str:
        """Hexadecimal SHA-256 of an encoded image. Raises OSError where it cannot be read."""
        content = Path(image).read_bytes() if isinstance(image, str | Path) else image.read()
        return hashlib.sha256(content).hexdigest()

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / key

    def read(self, key: str) -> torch.Tensor | None:
        """[P, Hv], or None where they are not stored. A damaged file is removed, and written again later."""
        path = self._path(key)
        try:
            content = bytearray(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            self._tell(f"{path} cannot be read ({error}): such images are encoded every time")
            return None
        checksum = int.from_bytes(content[-CHECKSUM_BYTES:], "little")
        if len(content) != self._size or zlib.crc32(memoryview(content)[:-CHECKSUM_BYTES]) != checksum:
            logger.warning("feature cache: %s is damaged; it is removed and made again", path)
            path.unlink(missing_ok=True)
            return None
        return torch.frombuffer(content, dtype=self._dtype, count=self._shape[0] * self._shape[1]).view(self._shape)

    def write(self, key: str, features: torch.Tensor) -> None:
        """Store [P, Hv] features, unless they are there or the room is used up. A disk that cannot be written to ends
        the storing, not the run; both are logged once."""
        path = self._path(key)
        if self._room < self._size:
            self._tell("the room for features is used up: further images are encoded every time (--feature-cache-size)")
            return
        if path.exists():
            return
        content = _bytes_of(features.to(self._dtype))
        unfinished = path.with_name(f"{key}-{uuid.uuid4().hex}{UNFINISHED}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                file.write(content)
                file.write(zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "little"))
            os.replace(unfinished, path)
        except OSError as error:
            self._room = 0
            self._tell(f"nothing more is stored in {self._folder} ({error}): further images are encoded every time")
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            return
        self._room -= self._size

    def _tell(self, message: str) -> None:
        if not self._told:
            logger.warning("feature cache: %s", message)
        self._told = True
