"""GQA's scene graphs: the boxes of an image's objects by their ids."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from mindspeed_mm.data.records import RecordFile
from mindspeed_mm.data.storage.objects import local_file
from mindspeed_mm.errors import ConfigError, DataError


class SceneGraphs:
    """Scene graphs of a JSONL file, {"image_id": "2370799", "objects": {"1": {"x": 3, "y": 4, "w": 10, "h": 8}}} a
    line, read on demand."""

    def __init__(self, path: str, index: str | None = None) -> None:
        """`index`: a JSON object, image id -> line from 0 on; None: every line is looked at once.

        Raises ConfigError for an index that is none, DataError for a damaged file.
        """
        self.path, self._records = path, RecordFile(path)
        self._lines = _read_index(index) if index else self._look()

    def _look(self) -> dict[str, int]:
        return {str(self._records[number].get("image_id")): number for number in range(len(self._records))}

    def boxes(self, image_id: str) -> dict[str, list[float]]:
        """[left, top, right, bottom] of each object. Raises DataError for an image without a graph, or that of another
        image."""
        number = self._lines.get(image_id)
        if number is None or not 0 <= number < len(self._records):
            raise DataError(f'"imageId" is "{image_id}", which has no scene graph in {self.path}; give its graphs')
        record = self._records[number]
        found = record.get("image_id", image_id)
        if str(found) != image_id:
            raise DataError(
                f'"imageId" is "{image_id}", and line {number + 1} of {self.path} is the scene graph of image {found}; '
                "correct scene_graph_index, or give the graphs that belong to it"
            )
        objects = record.get("objects")
        try:
            return {key: _corners(value) for key, value in (objects or {}).items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise DataError(
                f'line {number + 1} of {self.path}: "objects" is no object of boxes with x, y, w and h ({error!r}); '
                "correct the scene graph"
            ) from error


def _corners(value: dict[str, Any]) -> list[float]:
    left, top = value["x"], value["y"]
    return [left, top, left + value["w"], top + value["h"]]


@functools.lru_cache(maxsize=4)
def scene_graphs(path: str, index: str | None) -> SceneGraphs:
    """The graphs of a file, opened once in a process."""
    return SceneGraphs(path, index)


def _read_index(path: str) -> dict[str, int]:
    try:
        found = json.loads(Path(local_file(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read grounding.scene_graph_index {path}: {error}; correct it") from error
    if not isinstance(found, dict) or not all(type(line) is int for line in found.values()):
        raise ConfigError(f"grounding.scene_graph_index {path} is no JSON object of image ids and lines; correct it")
    return found
