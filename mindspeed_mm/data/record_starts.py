"""Where the records of a JSON list or of a JSONL file begin, found in one pass at constant memory.

Both scans work on bytes. Lines are found by their ends alone. Elements of a list are found by the C scanner of Python's
json on a window of the file decoded as Latin-1: a byte is then a character, and what JSON is made of is ASCII, which no
byte of a longer UTF-8 character can be.
"""

from __future__ import annotations

import codecs
import json
from array import array
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from mindspeed_mm.config.load import object_without_duplicates

BLOCK_BYTES = 4 * 2**20
MAX_RECORD_BYTES = 64 * 2**20
"""A longer record is taken for damage (an unclosed bracket would swallow the rest of the file)."""

JSON_SPACE = b" \t\r\n"
DECODER = json.JSONDecoder()
STRICT_DECODER = json.JSONDecoder(object_pairs_hook=object_without_duplicates)
"""Refuses a key that is there twice in one object, of which the first value would be dropped."""


class Damage(NamedTuple):
    """Where a list cannot be read on."""

    number: int
    """Records before it."""
    position: int
    """Byte of the file."""
    reason: str


def line_starts(file: BinaryIO, position: int, advance: Callable[[int], None]) -> np.ndarray:
    """Bytes at which the lines behind `position` begin that are not blank, then the end of the file; int64.

    A line ends with LF, CR LF or CR, in any mixture: no string of JSON holds one of them.
    """
    starts, indented = [], []
    file.seek(position)
    at_start = True
    while block := file.read(BLOCK_BYTES):
        values = np.frombuffer(block, dtype=np.uint8)
        is_end = values == ord("\n")
        if b"\r" in block:
            is_end |= values == ord("\r")
        behind = np.flatnonzero(is_end) + 1
        ends_here = bool(len(behind)) and int(behind[-1]) == len(block)
        begins = behind[:-1] if ends_here else behind
        if at_start:
            begins = np.concatenate([np.zeros(1, dtype=begins.dtype), begins])
        begins = begins[~is_end[begins]]
        starts.append(begins + position)
        firsts = values[begins]
        indented.append((firsts == ord(" ")) | (firsts == ord("\t")))
        at_start = ends_here
        position += len(block)
        advance(len(block))
    found = np.concatenate([*starts, np.full(1, position)]).astype(np.int64)
    kept = np.ones(len(found), dtype=bool)
    for number in np.flatnonzero(np.concatenate([*indented, np.zeros(1, dtype=bool)])):
        file.seek(int(found[number]))
        kept[number] = bool(file.read(int(found[number + 1] - found[number])).strip(JSON_SPACE))
    return found[kept]


def list_starts(file: BinaryIO, position: int, advance: Callable[[int], None]) -> tuple[np.ndarray, Damage | None]:
    """Bytes at which the elements of the list begin whose bracket is at `position`, then the byte behind the last one;
    int64. With the damage at which reading ended, if there is some.
    """
    window = _Window(file, position + 1)
    starts, end = array("q"), position + 1
    damage = None
    if window.next_mark() != "]":
        while damage is None:
            start = window.position
            try:
                window.skip_value()
            except (ValueError, RecursionError) as error:
                damage = Damage(len(starts), window.failed_at, getattr(error, "msg", str(error)))
                break
            starts.append(start)
            advance(window.position - end)
            end = window.position
            mark = window.next_mark()
            if mark == "]":
                break
            if mark != ",":
                damage = Damage(len(starts), window.position, f"expected a comma or the list's end, found {mark!r}")
            else:
                window.offset += 1
                if window.next_mark() == "]":
                    damage = Damage(len(starts), window.position, "expected a record behind the comma")
    if damage is None:
        window.offset += 1
        rest = window.next_mark()
        if rest:
            damage = Damage(len(starts), window.position, f"the list has ended, yet {rest!r} follows")
    starts.append(end)
    return np.frombuffer(starts, dtype=np.int64), damage


def list_values(file: BinaryIO, position: int, number: int = 0) -> Iterator[tuple[bytes, int]]:
    """(text of an element of a list, the byte behind it) one by one, without holding what was read.

    Args:
        position: the byte behind the list's bracket, or behind an element that was yielded before.
        number: of the first element that follows, counted from 0.

    Raises:
        ValueError: the list is damaged; with the number of the element and the byte.
    """
    window = _Window(file, position)
    first = number == 0
    while (mark := window.next_mark()) != "]":
        if not first and mark != ",":
            raise ValueError(f"record {number}: expected a comma or the list's end at byte {window.position}")
        if not first:
            window.offset += 1
            window.next_mark()
        try:
            text = window.skip_value()
        except (ValueError, RecursionError) as error:
            raise ValueError(f"record {number}: not JSON at byte {window.failed_at} ({error})") from error
        yield text.encode("latin-1"), window.position
        first, number = False, number + 1


def object_members(file: BinaryIO, inside: str | None = None) -> Iterator[tuple[str, int, int, int]]:
    """The members of the file's object, or of the object that is its member `inside`, one by one: (key, byte at which
    it begins, byte at which its value begins, byte behind that). Values are not kept.

    Raises:
        ValueError: the file is no such object, or damaged; with the number of the member and the byte.
    """
    window = _Window(file, len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0)
    for key, _ in _opened(window) if inside is not None else ():
        if key == inside:
            break
        _passed(window, key)
    else:
        if inside is not None:
            raise ValueError(f'it has no member "{inside}"')
    for key, place in _opened(window):
        begin = window.position
        _passed(window, key)
        yield key, place, begin, window.position


def _opened(window: _Window) -> Iterator[tuple[str, int]]:
    """Keys of the object that begins here, and the byte at which each begins. The window then stands at the value,
    which the caller moves behind."""
    if (mark := window.next_mark()) != "{":
        raise ValueError(f"expected an object at byte {window.position}, found {mark!r}")
    window.offset += 1
    is_first = True
    while (mark := window.next_mark()) != "}":
        if not is_first:
            if mark != ",":
                raise ValueError(f"expected a comma or the object's end at byte {window.position}, found {mark!r}")
            window.offset += 1
            mark = window.next_mark()
        if mark != '"':
            raise ValueError(f"expected a key in quotes at byte {window.position}, found {mark!r}")
        place = window.position
        key = json.loads(_passed(window, "a key").encode("latin-1"))
        if (mark := window.next_mark()) != ":":
            raise ValueError(f"expected a colon behind the key at byte {window.position}, found {mark!r}")
        window.offset += 1
        window.next_mark()
        yield key, place
        is_first = False


def _passed(window: _Window, what: str) -> str:
    try:
        return window.skip_value()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what:.80}: not JSON at byte {window.failed_at} ({error})") from error


class _Window:
    """A stretch of the file that grows while a JSON value does not fit into it."""

    def __init__(self, file: BinaryIO, position: int):
        self._file = file
        self._text = ""
        self.base = position
        """Byte of the file at which the stretch begins."""
        self.offset = 0
        """Where in the stretch the unread part begins."""
        self.failed_at = position
        """Byte of the file at which a value could not be read."""

        file.seek(position)

    @property
    def position(self) -> int:
        """Byte of the file at which the unread part begins."""
        return self.base + self.offset

    def _more(self) -> bool:
        block = self._file.read(BLOCK_BYTES)
        self._text = self._text[self.offset :] + block.decode("latin-1")
        self.base += self.offset
        self.offset = 0
        return bool(block)

    def next_mark(self) -> str:
        """Move to the next character that is not white space and return it; empty at the end of the file."""
        while True:
            while self.offset < len(self._text):
                mark = self._text[self.offset]
                if mark not in " \t\r\n":
                    return mark
                self.offset += 1
            if not self._more():
                return ""

    def skip_value(self) -> str:
        """Move behind the value at the current position and return its text. Raises ValueError or RecursionError,
        having set `failed_at`."""
        self.failed_at = self.position
        while True:
            try:
                _, end = DECODER.raw_decode(self._text, self.offset)
            except json.JSONDecodeError as error:
                self.failed_at = self.base + error.pos
                # Either damage or a value that the window cuts off: only more text can tell.
                if len(self._text) - self.offset > MAX_RECORD_BYTES or not self._more():
                    raise
                continue
            if end == len(self._text) and self._more():
                continue  # a number may go on
            begin, self.offset = self.offset, end
            return self._text[begin:end]
