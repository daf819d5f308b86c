"""Ids to text while they come: whole characters only, stop strings wherever the borders of tokens fall."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from mindspeed_mm.data.tokenizer_base import Tokenizer

REPLACEMENT = "\ufffd"
"""What decoding gives for bytes that are no whole character (yet)."""

PATIENCE = 32
"""Tokens to wait for the rest of a character; a model that emits so many broken bytes is not writing text."""


class TextStream:
    """Text of one answer, token by token.

    The pieces that `add` and `finish` return, joined, are `text`: the decoded answer up to the first stop string,
    without white space at either end. Text that may yet turn out to begin a stop string is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        self._from = self._read = 0  # ids before _from are not decoded again; those before _read are in _text
        self._text = ""
        self._sent = 0
        self.stopped = False

    def fork(self) -> TextStream:
        """A stream that has seen the same tokens and goes its own way from here."""
        other = copy.copy(self)
        other._ids = list(self._ids)
        return other

    @property
    def text(self) -> str:
        """What is known of the answer so far."""
        return self._text.strip()

    def add(self, token_id: int) -> str:
        """Take one token and return the text that is now certain ("" for none)."""
        if self.stopped or token_id >= self._tokenizer.vocab_size:
            return ""  # rows that only pad the head stand for no text
        self._ids.append(token_id)
        self._decode(final=False)
        return self._send(final=self.stopped)

    def finish(self) -> str:
        """Return what was held back."""
        if not self.stopped:
            self._decode(final=True)
        return self._send(final=True)

    def _decode(self, final: bool) -> None:
        """Decode the new ids behind a few old ones: the first token of a text loses its space, the others keep it."""
        old = self._tokenizer.decode(self._ids[self._from : self._read])
        new = self._tokenizer.decode(self._ids[self._from :])
        unfinished = new.endswith(REPLACEMENT) and len(self._ids) - self._read < PATIENCE
        if (unfinished and not final) or len(new) <= len(old):
            return
        known = len(self._text)
        self._text += new[len(old) :]
        self._from, self._read = self._read, len(self._ids)
        self._find_stop(known)

    def _find_stop(self, known: int) -> None:
        longest = max(map(len, self._stops), default=0)
        places = [self._text.find(stop, max(0, known - longest + 1)) for stop in self._stops]
        found = [place for place in places if place >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True

    def _send(self, final: bool) -> str:
        end = len(self._text)
        if not final:
            end -= max((_overlap(self._text, stop) for stop in self._stops), default=0)
        certain = self._text[:end].rstrip()
        if self._sent == 0:
            self._sent = len(certain) - len(certain.lstrip())
        piece = certain[self._sent :]
        self._sent = max(self._sent, len(certain))
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop` that ends `text`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
