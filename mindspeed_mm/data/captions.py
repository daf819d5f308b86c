"""Text processors of captions."""

from __future__ import annotations

import re

MARKS = re.compile(r"[.!\"()*#:;~]")
MAX_WORDS = 50


def blip_caption(text: str, most: int = MAX_WORDS) -> str:
    """LAVIS's and MiniGPT-4's processor of this name: lower case, without some marks, at most `most` words."""
    words = MARKS.sub(" ", text.lower()).split()
    return " ".join(words[:most])
