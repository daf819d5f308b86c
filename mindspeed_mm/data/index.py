"""What is computed once about a large data file, stored in a cache folder and mapped by every rank and worker.

An array of the cache is one file: a header of HEADER_BYTES (JSON, padded with spaces) and the raw values. Its name is
made of the data file's path and of what the values depend on besides the file (`key`); the header holds the file's
size, time of change and a digest of its head and tail, so that a changed file is noticed. Writing goes beside, then
renames; a lock makes the ranks of one machine wait for the first one, which builds. No process group is involved.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

logger = logging.getLogger(__name__)

HEADER_BYTES = 4096
VERSION = 7
"""Counted up whenever records are checked or counted differently: older arrays are then built again."""

DIGEST_BYTES = 65536
SMALL_BYTES = 16 * 2**20
"""A smaller file is read in well under a second, so nothing is stored for it."""


def default_folder() -> Path:
    """Where arrays are stored unless data.json names a folder."""
    return Path.home() / ".cache" / "mindspeed-mm" / "index"


class Index:
    """The stored arrays of one data file."""

    def __init__(self, path: str | Path, folder: str | Path | None, key: dict[str, Any] | None = None):
        """`folder=None` stores nothing. `key` is JSON-able: what the values depend on besides the file."""
        self.path = Path(os.path.abspath(path))
        self._folder = None if folder is None else Path(folder)
        self._key = json.dumps(key or {}, sort_keys=True)

    @property
    def stores(self) -> bool:
        """Whether arrays of this file are stored."""
        return self._folder is not None and self.path.is_file() and self.path.stat().st_size >= SMALL_BYTES

    def array(self, name: str, dtype: Any, build: Callable[[], np.ndarray], **more: Any) -> np.ndarray:
        """The stored array `name`, mapped read-only, or the one that `build()` returns, stored for later.

        `more` adds to the key for this array alone. Errors of `build` go through; a folder that cannot be written is
        logged, the array then stays in memory.
        """
        if not self.stores:
            return build()
        try:
            return self._stored(name, np.dtype(dtype), more, lambda file: file.write(_raw(build(), dtype)))
        except OSError as error:  # no rights, no space, a read-only disk
            logger.warning("the index of %s is not stored (%s): set index_folder in data.json", self.path, error)
            return build()

    def content(self, name: str, write: Callable[[BinaryIO], Any]) -> np.ndarray:
        """The stored bytes `name`, mapped read-only [n] uint8, or what `write(file)` writes, stored for later (of a
        small file in memory). For what is too large to be held in memory: OSError of a folder that cannot be written
        goes through.
        """
        if self.stores:
            return self._stored(name, np.dtype(np.uint8), {}, write)
        buffer = io.BytesIO()
        write(buffer)
        return np.frombuffer(buffer.getvalue(), dtype=np.uint8)

    def _stored(self, name: str, dtype: np.dtype, more: dict[str, Any], write: Callable[[BinaryIO], Any]) -> np.ndarray:
        target = self._target(name, more)
        header = self._header(name, dtype)
        found = _map(target, header)
        if found is not None:
            return found
        with _locked(target):
            found = _map(target, header)  # another process may have been first
            if found is None:
                _write(target, header, write)
                found = _map(target, header)
        assert found is not None
        return found

    def _target(self, name: str, more: dict[str, Any]) -> Path:
        digest = hashlib.sha256(f"{self.path}|{self._key}|{json.dumps(more, sort_keys=True)}".encode()).hexdigest()
        assert self._folder is not None
        return self._folder / f"{self.path.name}-{digest[:20]}.{name}"

    def _header(self, name: str, dtype: np.dtype) -> dict[str, Any]:
        status = self.path.stat()
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            digest.update(file.read(DIGEST_BYTES))
            file.seek(max(status.st_size - DIGEST_BYTES, 0))
            digest.update(file.read(DIGEST_BYTES))
        return {
            "version": VERSION,
            "name": name,
            "dtype": dtype.str,
            "bytes": status.st_size,
            "changed": status.st_mtime_ns,
            "digest": digest.hexdigest(),
        }


def _map(target: Path, header: dict[str, Any]) -> np.ndarray | None:
    """The values of an array file that fits the header; None where there is none, or a stale or unfinished one."""
    try:
        size = target.stat().st_size
        with target.open("rb") as file:
            stored = json.loads(file.read(HEADER_BYTES))
    except (FileNotFoundError, ValueError):
        return None
    if {key: value for key, value in stored.items() if key != "count"} != header:
        logger.info("the index of %s is out of date and is built again", target.name)
        return None
    dtype = np.dtype(header["dtype"])
    if size != HEADER_BYTES + stored["count"] * dtype.itemsize or not stored["count"]:
        return None
    return np.memmap(target, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(stored["count"],))


def _raw(values: np.ndarray, dtype: Any) -> memoryview:
    return np.ascontiguousarray(values, dtype=np.dtype(dtype)).data


def _write(target: Path, header: dict[str, Any], write: Callable[[BinaryIO], Any]) -> None:
    """A header and what `write(file)` writes behind it, beside the target first."""
    beside = target.with_name(f"{target.name}.{os.getpid()}.new")
    try:
        with beside.open("wb") as file:
            file.write(b" " * HEADER_BYTES)
            write(file)
            count = (file.seek(0, os.SEEK_END) - HEADER_BYTES) // np.dtype(header["dtype"]).itemsize
            file.seek(0)
            file.write(json.dumps(header | {"count": count}).encode().ljust(HEADER_BYTES))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One process of this machine at a time; the lock ends with the process that holds it, however that ends."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(target.name + ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process indexes %s; waiting", target.name)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
