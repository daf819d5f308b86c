"""CLEVR in Shikra's form: questions about solids, with the steps that answer them and the points of what these find.

{"image_filename": "CLEVR_train_000000.png", "image_index": 0, "question": "How many cubes?", "answer": "2", "program":
[{"function": "scene", "inputs": [], "ans": [0, 1]}, {"function": "filter_shape", "inputs": [0], "value_inputs":
["cube"], "ans": [0, 1]}, {"function": "count", "inputs": [1], "ans": 2}]}

The version q-a answers alone, q-s with the steps, q-bs with the points of objects as well: behind steps that give
objects, of scene and filters the last one before exist and count. Points are pixel_coords of `scene_graphs`, JSONL with
one scene a line, whose number is image_index.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from mindspeed_mm.data.conversation import shown
from mindspeed_mm.data.datasets.vqa_v2 import ASK
from mindspeed_mm.data.grounding.item import POINTS, QUESTION
from mindspeed_mm.data.grounding.reading import Chance, Fields, PublicSet, turns, without_placeholders
from mindspeed_mm.data.keys import keys
from mindspeed_mm.data.records import RecordFile
from mindspeed_mm.errors import ConfigError, DataError

GIVES_OBJECTS = ("unique", "union", "intersect", "relate", "same_size", "same_shape", "same_material", "same_color")
NARROWS = ("scene", "filter_color", "filter_material", "filter_shape", "filter_size")
ENDS = ("exist", "count")

STEP = keys("a step of a program", "function", "type", "inputs", "value_inputs", "side_inputs", "ans", "_output")
"""`type` and `side_inputs` are older names of CLEVR's `function` and `value_inputs`."""


def _item(fields: Fields, chance: Chance) -> dict[str, Any]:
    version = chance.settings.version
    steps, points, sequence = [], [], []
    if version != "q-a":
        objects = _objects(fields, chance) if version == "q-bs" else None
        steps, points, sequence = _trace(fields, objects)
    reason = " -> ".join(steps)
    answer = f"{reason} The answer is {fields.plain('answer')}.".strip()
    return {
        "image": fields.text("image_filename"),
        "target": {"points": points},
        "conversations": turns(
            chance.question(question=fields.plain("question")),
            answer,
            **({"answer_points": sequence} if sequence else {}),
        ),
    }


def _trace(fields: Fields, objects: list[list[float]] | None) -> tuple[list[str], list[list[float]], list[list[int]]]:
    """The steps, the points that they name, and which of them stand behind each step."""
    program = fields.items("program")
    steps: list[str] = []
    points: list[list[float]] = []
    sequence: list[list[int]] = []
    for number, step in enumerate(program):
        place = f'"program"[{number}]'
        fields.check_keys(STEP, step, place)
        name = step.get("function") if isinstance(step, Mapping) else None
        inputs = step.get("inputs") if isinstance(step, Mapping) else None
        if not isinstance(name, str) or not isinstance(inputs, list):
            raise DataError(f'{place} is {shown(step)}; expected {{"function": "scene", "inputs": []}}.')
        values = step.get("value_inputs") or []
        text = ":".join([without_placeholders(name, place), *map(str, values[:1])])
        text += f"[{','.join(map(str, inputs))}]" if inputs else ""
        following = program[number + 1] if number + 1 < len(program) else None
        ends = isinstance(following, Mapping) and following.get("function") in ENDS
        if objects is not None and (name in GIVES_OBJECTS or (name in NARROWS and ends)):
            found = [_point(objects, number, f"{place}.ans") for number in _answers(step, place)]
            points += [point for point in found if point not in points]
            if found:
                sequence.append([points.index(point) for point in found])
            text += f" {POINTS}" if found else " found nothing"
        steps.append(text)
    return steps, points, sequence


def _answers(step: Mapping[str, Any], place: str) -> list[int]:
    found = step.get("ans")
    found = [found] if type(found) is int else found
    if not isinstance(found, list) or any(type(number) is not int for number in found):
        raise DataError(f"{place}.ans is {shown(step.get('ans'))}; expected the numbers of the objects of this step.")
    return found


def _point(objects: list[list[float]], number: int, place: str) -> list[float]:
    if not 0 <= number < len(objects):
        raise DataError(
            f"{place} names object {number}, and the scene has {len(objects)}; give the scene of this image"
        )
    return objects[number]


def _objects(fields: Fields, chance: Chance) -> list[list[float]]:
    """Points of the scene's objects. Raises DataError for another image's scene."""
    path, number = chance.settings.scene_graphs, fields.value("image_index")
    if path is None:
        raise ConfigError("grounding.version q-bs needs points of objects: give grounding.scene_graphs")
    scenes = _scenes(path)
    if type(number) is not int or not 0 <= number < len(scenes):
        raise DataError(f'"image_index" is {shown(number)}, and {path} has {len(scenes)} scenes; correct either.')
    scene = scenes[number]
    other = scene.get("image_filename", fields.value("image_filename"))
    if other != fields.value("image_filename"):
        raise DataError(
            f"line {number + 1} of {path} is the scene of {shown(other)}, and the record asks about "
            f"{shown(fields.value('image_filename'))}; give the scenes of these questions."
        )
    objects = Fields(scene).items("objects")
    return [Fields(entry if isinstance(entry, Mapping) else {}).first("pixel_coords", 2) for entry in objects]


@functools.lru_cache(maxsize=4)
def _scenes(path: str) -> RecordFile:
    return RecordFile(path)


DATASET = PublicSet(
    "clevr",
    keys(
        "a record of clevr",
        *("image_filename", "image_index", "question", "answer", "program", "question_index"),
        *("question_family_index", "split"),
    ),
    _item,
    template=ASK,
    placeholders=("<image>", QUESTION),
    versions=("q-a", "q-s", "q-bs"),
    uses=("scene_graphs",),
)
