"""Where the bytes of an image come from: a regular file, or memory."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from mindspeed_mm.data.sample import EncodedImage
from mindspeed_mm.errors import DataError


class ImageError(DataError):
    """An image cannot be used; the policy `image_error` of the data config decides what follows."""


def opened(source: str | Path | EncodedImage) -> str | Path | io.BytesIO:
    """What Pillow opens. Raises ImageError for a folder, a pipe or a device, which would be waited for."""
    if not isinstance(source, str | Path):
        return io.BytesIO(source.read())
    if not stat.S_ISREG(os.stat(source).st_mode):
        raise ImageError(
            f"image {source} is a folder, a pipe or a device; expected a regular file. Correct the path, or remove the "
            "record."
        )
    return source


def is_empty(source: str | Path | EncodedImage) -> bool:
    """Whether there is not a single byte."""
    if isinstance(source, str | Path):
        return os.path.isfile(source) and not os.path.getsize(source)
    return not source.size
