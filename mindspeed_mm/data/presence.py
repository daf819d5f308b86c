"""Are the image files there, with something in them? Looked at when a run starts, for as long as that takes seconds."""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass, field

import numpy as np

from mindspeed_mm.data.dataset import MultimodalDataset
from mindspeed_mm.data.image import ImageError, load_image
from mindspeed_mm.data.progress import progress_bar
from mindspeed_mm.data.sample import EncodedImage
from mindspeed_mm.data.storage.objects import StoredImage

SECONDS = 5.0
"""So long a start may look for files."""

EXAMPLES = 3
"""Missing files of which a message speaks."""


@dataclass
class Presence:
    """What one process has found. Sums up with `+`."""

    samples: int = 0
    """Looked at."""
    all_samples: int = 0
    images: int = 0
    missing: int = 0
    """Not there, empty, or no regular files."""
    examples: list[str] = field(default_factory=list)
    """What is wrong with the first missing ones."""

    def __add__(self, other: Presence) -> Presence:
        return Presence(
            self.samples + other.samples,
            self.all_samples + other.all_samples,
            self.images + other.images,
            self.missing + other.missing,
            (self.examples + other.examples)[:EXAMPLES],
        )

    @property
    def is_whole(self) -> bool:
        """Whether time allowed to look at everything."""
        return self.samples == self.all_samples


def look_for_images(dataset: MultimodalDataset, share: int = 0, shares: int = 1, seconds: float = SECONDS) -> Presence:
    """Ask the file system for the images of every `shares`-th sample, for at most `seconds`.

    The samples come in a random order that is always the same, so that a look which ends early has been everywhere.
    Images inside tar and parquet files are there with the file.
    """
    numbers = np.random.default_rng(0).permutation(len(dataset))[share::shares]
    found = Presence(all_samples=len(numbers))
    end = time.monotonic() + seconds
    with progress_bar("looking for images", len(numbers)) as advance:
        for number in numbers:
            if time.monotonic() > end:
                break
            sample = dataset.sample(int(number))
            for image in sample.files:
                found.images += 1
                if not _is_there(image):
                    found.missing += 1
                    if len(found.examples) < EXAMPLES:
                        found.examples.append(f"{sample.where}: {_problem(image)}")
            found.samples += 1
            advance(1)
    return found


def _is_there(image: str | EncodedImage) -> bool:
    if not isinstance(image, str):
        return image.is_there() if isinstance(image, StoredImage) else True
    try:
        found = os.stat(image)
    except (OSError, ValueError):  # not there, behind a loop of links, or of a name that no file can have
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size > 0


def _problem(image: str | EncodedImage) -> str:
    """What is said wherever an image is missing; it knows files of the same name with another suffix."""
    try:
        load_image(image)
    except ImageError as error:
        return str(error)
    return f"image {image} came while the others were looked for"
