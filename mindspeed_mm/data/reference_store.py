"""Log-probabilities of answers under a reference model, kept on disk from one epoch or run to the next.

A pair is named by what goes into the model: its tokens, what of them is supervised, and its pixels. The folder of a
reference is named by its weights. So what is found fits, whatever happened to data, template, image settings or model;
what does not fit is not found. Each process appends to a file of its own: any number of ranks and runs share a folder.
"""

from __future__ import annotations

import hashlib
import logging
import struct
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from mindspeed_mm.models.media import Media

logger = logging.getLogger(__name__)

FORMAT = 1
KEY_BYTES = 16
VALUES = struct.Struct("<ff")
RECORD_BYTES = KEY_BYTES + VALUES.size + 4
"""Key, both log-probabilities in float32, and their checksum."""


def pair_key(input_ids: Sequence[int], labels: Sequence[int], branches: Sequence[int], media: Sequence[Media]) -> bytes:
    """Name of a pair, KEY_BYTES long."""
    digest = hashlib.blake2b(f"{FORMAT} {branches} {input_ids} {labels}".encode(), digest_size=KEY_BYTES)
    for item in media:
        digest.update(f"{tuple(item.pixels.shape)} {item.pixels.dtype} {item.grid.tolist()}".encode())
        digest.update(memoryview(item.pixels.contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.digest()


class ReferenceStore:
    """What is known of one reference model."""

    def __init__(self, folder: Path, name: str) -> None:
        """Reads `folder`/`name`, `name` being the model's fingerprint; damaged records are left out and told."""
        self.folder = folder / name
        self._own = self.folder / f"{uuid.uuid4().hex}.logprobs"
        self._known: dict[bytes, tuple[float, float]] = {}
        damaged = 0
        for path in sorted(self.folder.glob("*.logprobs")):
            damaged += self._read(path)
        if damaged:
            logger.warning("%s: %d damaged records are left out; those pairs are computed again", self.folder, damaged)
        self.unwritten = 0
        """Pairs that the disk did not take."""
        self.found = len(self._known)
        """Pairs that were there when the folder was read."""

    def _read(self, path: Path) -> int:
        content, damaged = path.read_bytes(), 0
        for start in range(0, len(content), RECORD_BYTES):
            record = content[start : start + RECORD_BYTES]
            if len(record) < RECORD_BYTES or zlib.crc32(record[:-4]) != int.from_bytes(record[-4:], "little"):
                damaged += 1
                continue
            self._known[record[:KEY_BYTES]] = VALUES.unpack(record[KEY_BYTES:-4])
        return damaged

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: bytes) -> bool:
        return key in self._known

    def values(self, keys: Sequence[bytes]) -> torch.Tensor:
        """[N, 2] float32 of the chosen and the rejected answers, all of them known."""
        return torch.tensor([self._known[key] for key in keys], dtype=torch.float32).reshape(-1, 2)

    def add(self, keys: Sequence[bytes], values: torch.Tensor, *, write: bool) -> None:
        """Know [N, 2] more; with `write`, on disk as well. A disk that takes nothing ends no run: it is told once, and
        counted in `unwritten`."""
        records = []
        for key, (chosen, rejected) in zip(keys, values.tolist(), strict=True):
            self._known[key] = (chosen, rejected)
            record = key + VALUES.pack(chosen, rejected)
            records.append(record + zlib.crc32(record).to_bytes(4, "little"))
        if write and not self.unwritten:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with self._own.open("ab") as file:
                    file.write(b"".join(records))
                return
            except OSError as error:
                logger.warning("%s: %s; log-probabilities are kept for this run alone", self.folder, error.strerror)
        self.unwritten += len(records) if write else 0
