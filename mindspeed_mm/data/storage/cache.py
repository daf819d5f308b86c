"""Copies of objects on this host: used last stays longest, and all of them together stay within a limit.

images/  objects of the size of an image, read whole; what is there is not asked for again
files/   data files, by address and version; those that a process has open are never removed
used     bytes of both, written by whoever has it locked
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mindspeed_mm.data.storage.service import ObjectFacts, endpoint_of
from mindspeed_mm.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

FOLDER_VARIABLE, SIZE_VARIABLE = "MINDSPEED_MM_STORAGE_CACHE", "MINDSPEED_MM_STORAGE_CACHE_GB"
DEFAULT_GB = 50.0
GB = 10**9
KEPT = 0.9
"""Of the limit, when room is made."""

UNFINISHED = ".new"
ABANDONED_SECONDS = 86400
"""An unfinished file that is older belongs to no process any more."""

DIGITS = 40
"""Hexadecimal digits of a name."""

_held: dict[Path, int] = {}
"""Descriptors of the data files in use, with a shared lock each, until the process ends."""


class ObjectCache:
    """A folder of copies. Any number of processes of this host share it."""

    def __init__(self, folder: Path, limit: int, store: str = "") -> None:
        """`limit`: bytes of all copies together; `store` tells equal addresses of different stores apart."""
        self.folder, self.limit, self._store = folder, limit, store

    @classmethod
    def of_environment(cls) -> ObjectCache:
        """The cache that the variables name. Raises ConfigError for a size that is none."""
        folder = os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "mindspeed-mm" / "storage"
        text = os.environ.get(SIZE_VARIABLE) or str(DEFAULT_GB)
        try:
            size = float(text)
        except ValueError:
            size = -1.0
        if not 0 <= size < float("inf"):
            raise ConfigError(f"{SIZE_VARIABLE} is {text!r:.40}; expected gigabytes as a number, such as 50")
        return cls(Path(os.path.abspath(folder)), int(size * GB), endpoint_of(os.environ) or "")

    def image(self, address: str, fetch: Callable[[str], bytes]) -> bytes:
        """The bytes of an object, from here or by `fetch`, whose errors go through."""
        name = _name(f"{self._store} {address}")
        path = self.folder / "images" / name[:2] / name
        try:
            content = path.read_bytes()
        except OSError:
            content = b""
        if content:  # nothing of an object with bytes is left by a host that lost its power
            _touch(path)
            return content
        content = fetch(address)
        try:
            self._keep(path, content)
        except OSError as error:
            logger.warning("the cache %s takes nothing more (%s); images are fetched every time", self.folder, error)
        return content

    def _keep(self, path: Path, content: bytes) -> None:
        if not self._make_room(len(content)):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
        try:
            beside.write_bytes(content)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    def file(self, address: str, facts: ObjectFacts, fetch: Callable[[Path], None]) -> Path:
        """The file with a copy of an object, made by `fetch` where this version is not there. It stays while this
        process or a child lives.

        Raises DataError where the limit has no room for it, or the folder cannot be written.
        """
        name = _name(f"{self._store} {address}\n{facts.version}\n{facts.size}")
        path = self.folder / "files" / name / address.rpartition("/")[2]
        if path in _held and path.exists():
            return path
        try:
            self._make_folder()
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.parent.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # one process fetches, the others of this host wait
                _held[path] = _hold(path) or self._fetched(path, address, facts, fetch)
        except OSError as error:
            raise DataError(
                f"{address} cannot be stored in {self.folder}: {error.strerror or error}; set {FOLDER_VARIABLE} to a "
                "folder with room"
            ) from error
        _touch(path)
        return path

    def _fetched(self, path: Path, address: str, facts: ObjectFacts, fetch: Callable[[Path], None]) -> int:
        """Fetch a file, and hold it. Returns its descriptor."""
        if not self._make_room(facts.size):
            raise DataError(
                f"{address} has {facts.size} bytes; with the data files in use that is more than the {self.limit} that "
                f"the cache {self.folder} may have. Raise {SIZE_VARIABLE}"
            )
        beside = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
        try:
            fetch(beside)
            size = beside.stat().st_size
            if size != facts.size:
                raise DataError(f"{address} gave {size} of {facts.size} bytes; it has changed, or was cut. Try again")
            if facts.changed is not None:  # what is stored about a file goes by this time
                os.utime(beside, (facts.changed, facts.changed))
            descriptor = os.open(beside, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        return descriptor

    def _make_folder(self) -> None:
        """For its user alone: what the store gives to one is not everybody's."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def _make_room(self, size: int) -> bool:
        """Count `size` bytes that come. Where that is too much, copies go that were not used for longest. Returns
        whether there is room; what was counted and never came is put right at the next look into the folder."""
        if size > self.limit:
            return False
        self._make_folder()
        with (self.folder / "used").open("a+") as counter:
            fcntl.flock(counter, fcntl.LOCK_EX)
            counter.seek(0)
            text = counter.read()
            total = int(text) + size if text.isdigit() else self.limit + 1
            if total > self.limit:
                total = self._emptied(size)
            has_room = total <= self.limit
            counter.truncate(0)
            counter.write(str(total if has_room else total - size))
        return has_room

    def _emptied(self, size: int) -> int:
        """Bytes of all copies and of `size` more, after those that were not used for longest are removed."""
        entries = sorted(self._entries())
        total = size + sum(entry[1] for entry in entries)
        if total <= self.limit:
            return total
        for _, held, path in entries:
            if total <= KEPT * self.limit:
                break
            total -= held if _removed(path) else 0
        return total

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """(nanoseconds since 1970 of the last use, bytes, path) of every copy."""
        for path in self.folder.glob("[if]*/*/*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if not path.name.endswith(UNFINISHED) or time.time() - status.st_mtime > ABANDONED_SECONDS:
                yield status.st_atime_ns, status.st_size, path


def _name(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:DIGITS]


def _touch(path: Path) -> None:
    """Note that a copy is used now. The file system may not do so itself, or once a day."""
    with contextlib.suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def _hold(path: Path) -> int | None:
    """A descriptor of a data file that keeps it from being removed; None where it is not there."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # it was removed between the two


def _removed(path: Path) -> bool:
    """Remove a copy, unless a process holds it."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    return True
