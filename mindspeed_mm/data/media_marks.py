"""Marks of images, videos and audio in texts, which other suites fill, and which nothing fills here."""

import re
from collections.abc import Iterable

from mindspeed_mm.constants import IMAGE_TOKEN
from mindspeed_mm.data.sample import Turn
from mindspeed_mm.errors import UnknownKeyError

_SUFFIXES = "jpg jpeg png webp gif bmp tif tiff mp4 avi mkv mov webm wav mp3 flac ogg m4a".split()
_FILES = re.compile(
    rf"<(img|image|video|audio)>(?:[^<>\n]{{0,1000}}[^<>\s]\.(?:{'|'.join(_SUFFIXES)})|https?://[^<>\s]{{1,1000}})</\1>",
    re.IGNORECASE,
)
"""A file that is named in the text: Qwen-VL and ms-swift."""

_MARKS = re.compile(
    r"<(?:video|audio)>|<\|(?:image|video|audio)_pad\|>|<\|vision_start\|>|<image_?[0-9]{1,3}>|<ImageHere>|<IMG_CONTEXT>"
)
"""Placeholders of LLaMA-Factory, ms-swift, InternVL, Qwen2-VL, MMMU and MiniGPT-4."""


def unfilled_marks(turns: Iterable[Turn], policy: str) -> list[str]:
    """Marks in questions that stay text, each once, as keys that nothing reads are told; `<image>` too where it stands
    for none.

    Raises UnknownKeyError for a file that is named in a text, unless `policy` is "warn": it would not be looked at.
    """
    found: list[str] = []
    for turn in turns:
        if turn.role != "human" or "<" not in turn.text:
            continue
        match = _FILES.search(turn.text)
        if match is not None and policy == "error":
            raise UnknownKeyError(
                f"a text names a file as {match.group()!r:.80}, which is not read here. Expected <image> in its place, "
                'and the name under "image" or "images". Correct the data, or set "unknown_keys": "warn" in '
                "dataset_param."
            )
        found += [f"<{match.group(1).lower()}>.. in a text"] if match is not None else []
        found += [f"{mark} in a text" for mark in _MARKS.findall(_FILES.sub("", turn.text))]
        found += [f"{IMAGE_TOKEN} without an image"] if turn.literal else []
    return list(dict.fromkeys(found))
