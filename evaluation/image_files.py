"""Images of a benchmark that are files of their own, in a folder or behind an `s3://` address."""

from __future__ import annotations

import ast
from pathlib import Path

from mindspeed_mm.data.sample import EncodedImage
from mindspeed_mm.data.storage.objects import absolute_folder, inside, is_address
from mindspeed_mm.errors import DataError


def image_texts(cell: str, where: str) -> list[str]:
    """The base64 texts of an image cell, or the names of an image_path cell: one, or a Python list of them."""
    if not cell.startswith("["):
        return [cell]
    try:
        values = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise DataError(f"{where}: the image list is not a Python list of texts: {cell[:40]}...") from error
    if not isinstance(values, list) or not values or not all(isinstance(value, str) and value for value in values):
        raise DataError(f"{where}: the image list must hold one or more texts; found {cell[:40]}...")
    return values


def root_of(folder: str | Path) -> Path | str:
    """A folder as a path, or its address."""
    return absolute_folder(folder) if isinstance(folder, str) and is_address(folder) else Path(folder)


def find_images(cell: str, root: Path | str, where: str) -> list[Path | EncodedImage]:
    """Files that an image_path cell names. Raises DataError for one that is outside `root` or missing; whether an
    object store has one is known when it is read."""
    found: list[Path | EncodedImage] = []
    for name in image_texts(cell, where):
        if isinstance(root, str):
            found.append(_in_store(name, root, where))
            continue
        target = (root / name).resolve()
        if not target.is_relative_to(root.resolve()):
            raise DataError(
                f"{where}: image file {name} lies outside {root}; give the folder above it as --image-root "
                "(image_root=)."
            )
        if not target.is_file():
            raise DataError(
                f"{where}: image file {name} does not exist below {root}; add it, or give the folder above the images "
                "as --image-root (image_root=)."
            )
        found.append(target)
    return found


def _in_store(name: str, root: str, where: str) -> EncodedImage:
    image = inside(root, name)
    if image is None:
        raise DataError(
            f"{where}: image file {name} lies outside {root}; give the address above it as --image-root (image_root=)."
        )
    return image


def read_image(image: Path | EncodedImage, where: str) -> bytes:
    """The bytes of a found image. Raises DataError where an object store does not have it."""
    try:
        return image.read_bytes() if isinstance(image, Path) else image.read()
    except FileNotFoundError as error:
        raise DataError(f"{where}: image file {error}") from error
