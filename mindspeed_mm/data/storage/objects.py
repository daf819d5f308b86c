"""What the suite asks for: a data file's path here, the bytes of an image, a name inside a folder."""

from __future__ import annotations

import os
import posixpath
from dataclasses import dataclass
from pathlib import Path

from mindspeed_mm.data.progress import progress_bar
from mindspeed_mm.data.sample import EncodedImage
from mindspeed_mm.data.storage import service
from mindspeed_mm.data.storage.cache import ObjectCache
from mindspeed_mm.data.storage.service import is_address
from mindspeed_mm.errors import DataError


@dataclass(frozen=True)
class StoredImage:
    """An image behind an address; read when it is needed."""

    address: str

    def __str__(self) -> str:
        return self.address

    @property
    def size(self) -> int:
        return len(self.read())

    def is_there(self) -> bool:
        """Whether the store has it. Raises DataError where it does not say."""
        try:
            service.facts_of(service.checked_address(self.address))
        except FileNotFoundError:
            return False
        return True

    def read(self) -> bytes:
        """Raises FileNotFoundError where there is no such object, DataError where the store does not give it."""
        address = service.checked_address(self.address)
        return ObjectCache.of_environment().image(address, service.content_of)


def local_file(path: str | Path) -> str | Path:
    """The path itself, or that of the copy of an address. The store is asked whether the copy is up to date.

    Raises DataError naming the address where there is none, or the store does not give it.
    """
    if not isinstance(path, str) or not is_address(path):
        return path
    address = service.checked_address(path)

    def fetch(target: Path) -> None:
        with progress_bar(f"fetching {address.rpartition('/')[2]}", facts.size) as advance:
            service.download(address, target, advance)

    try:
        facts = service.facts_of(address)
        return ObjectCache.of_environment().file(address, facts, fetch)
    except FileNotFoundError as error:
        raise DataError(f"cannot read the data file {error}. Correct its path") from error


def local_files(pattern: str) -> list[Path]:
    """Copies of all objects that an address with * and [0-9] names. Raises as `local_file`."""
    return [Path(local_file(address)) for address in service.addresses_like(service.checked_address(pattern))]


def absolute_folder(folder: str) -> str:
    """A folder's absolute path, or its address without a slash at the end."""
    return service.checked_address(folder) if is_address(folder) else os.path.abspath(folder)


def inside(folder: str, name: str) -> StoredImage | None:
    """The image of a name below an address, or of a whole address below it; None for one that leads elsewhere."""
    plain = posixpath.normpath(name.removeprefix(folder + "/"))
    if is_address(name.removeprefix(folder + "/")) or plain.startswith(("/", "../")) or plain in (".", ".."):
        return None
    return None if "\0" in plain else StoredImage(f"{folder}/{plain}")


def in_folder(folder: str | Path, name: str) -> str | EncodedImage:
    """An image by its name in a folder, which may be an address; a name may be an absolute path or an address.

    Nothing is asked of the disk or the store.
    """
    if is_address(name):
        return StoredImage(name)
    if not isinstance(folder, str) or not is_address(folder):
        return os.path.join(folder, name)
    return StoredImage(folder + "/" + posixpath.normpath(name))


def parent_of(path: str | Path) -> str | Path:
    """The folder, or the address, in which a file lies."""
    return path.rpartition("/")[0] if isinstance(path, str) and is_address(path) else Path(path).parent
