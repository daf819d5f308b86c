"""Flickr30k Entities' own files as records of the dataset kind flickr30k.

Sentences/ID.txt has a caption a line, "[/EN#283585/people A man] waits .", and Annotations/ID.xml the boxes of each
entity in pixels that count from 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mindspeed_mm.data.grounding.item import PHRASE_END, PHRASE_START
from mindspeed_mm.errors import DataError

ENTITY = re.compile(r"\[/EN#(\d+)((?:/[^\s/\]]+)+) ([^\]]*)\]")
MOST_BYTES = 2**24
"""Of one file; the largest annotation has some kilobytes."""


def read_entities(root: str | Path, image_id: str) -> Iterator[dict[str, Any]]:
    """One record for each caption of an image.

    A phrase whose entity has no box (a scene, or one that is not shown) stays plain words.

    Raises:
        DataError: a file that is missing, is no such file, or brackets that do not pair up.
    """
    root = Path(root)
    boxes = _boxes(root / "Annotations" / f"{image_id}.xml")
    path = root / "Sentences" / f"{image_id}.txt"
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if line.strip():
            yield {"id": f"{image_id}_{number - 1}", "image_id": image_id} | _record(line.strip(), boxes, path, number)


def _record(line: str, boxes: dict[str, list[list[int]]], path: Path, number: int) -> dict[str, Any]:
    found: list[list[int]] = []
    sequence: list[list[int]] = []

    def phrase(match: re.Match[str]) -> str:
        own = boxes.get(match[1], [])
        if not own:
            return match[3]
        for box in own:
            if box not in found:
                found.append(box)
        sequence.append([found.index(box) for box in own])
        return f"{PHRASE_START}{match[3]}{PHRASE_END}"

    sentence = ENTITY.sub(phrase, line)
    if "[" in sentence or "]" in sentence:
        raise DataError(f"{path}, line {number}: found brackets that are no [/EN#number/type words]; correct the line")
    return {"boxes": found, "sentence": sentence, "boxes_seq": sequence}


def _boxes(path: Path) -> dict[str, list[list[int]]]:
    """Boxes [left, top, right, bottom] from 0 on, by the id of their entity."""
    text = _text(path)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise DataError(f"{path} declares a document type or entities, which no annotation has; give the original file")
    try:
        tree = ElementTree.fromstring(text)
        found: dict[str, list[list[int]]] = {}
        for entry in tree.iter("object"):
            box = entry.find("bndbox")
            if box is None:
                continue
            corners = [int(box.findtext(name, "")) - 1 for name in ("xmin", "ymin", "xmax", "ymax")]
            for name in entry.findall("name"):
                found.setdefault(str(name.text), []).append(corners)
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{path} is no annotation of Flickr30k Entities ({error}); give the original file") from error
    return found


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DataError(f"{path} has more than {MOST_BYTES} bytes; expected a file of Flickr30k Entities")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}; expected the folders Sentences and Annotations"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 ({error}); give the original file") from error
