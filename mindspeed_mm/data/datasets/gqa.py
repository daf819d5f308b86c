"""GQA: questions about scenes, with the objects that question and answer speak of.

{"imageId": "2370799", "question": "Is the door red?", "answer": "yes", "fullAnswer": "Yes, the door is red.",
"semanticStr": "select: door (1231)->verify color: red [0]", "annotations": {"question": {"2": "1231"}, "fullAnswer":
{"2": "1231"}}, "cot": {"boxes": [[..]], "value": "<ph_st>The door<ph_ed> is red.", "seq": [[0]]}}

The version is QUESTION-ANSWER. The question: q plain, qb with boxes of its objects, qbp so by question_box_prob.
The answer: a alone, c the reasons without and bc with boxes, s the program without and bs with boxes, l the whole
answer without and bl with boxes; each of them ends in "The answer is yes.". An annotation names words by their number,
"2" or "2:4" (the words 2 and 3). The image is `imageId`.jpg.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mindspeed_mm.data.conversation import shown
from mindspeed_mm.data.datasets.flickr30k import image_name
from mindspeed_mm.data.datasets.vqa_v2 import ASK
from mindspeed_mm.data.grounding.item import BOXES, QUESTION
from mindspeed_mm.data.grounding.phrases import MarkedText
from mindspeed_mm.data.grounding.reading import Chance, Fields, PublicSet, turns
from mindspeed_mm.data.grounding.scene_graphs import scene_graphs
from mindspeed_mm.data.keys import keys
from mindspeed_mm.errors import ConfigError, DataError

QUESTIONS, ANSWERS = ("q", "qb", "qbp"), ("a", "c", "bc", "s", "bs", "l", "bl")
ANNOTATIONS = keys("annotations", "question", "answer", "fullAnswer")
REASONS = keys("cot", "boxes", "value", "seq")

OBJECT = re.compile(r" ?\((-|\d+(?:,\d+)*)\)")
"""The objects of a step of a program."""


class _Boxes:
    """The boxes of a record that are spoken of, each once."""

    def __init__(self, graph: Mapping[str, list[float]]) -> None:
        self.graph, self.used = graph, []

    def number(self, box: list[float]) -> int:
        if box not in self.used:
            self.used.append(box)
        return self.used.index(box)

    def of_object(self, identity: str, place: str) -> int:
        if identity not in self.graph:
            raise DataError(
                f"{place} names object {identity}, which the image's scene graph does not have; give the scene graph "
                "of this image"
            )
        return self.number(self.graph[identity])


def _item(fields: Fields, chance: Chance) -> dict[str, Any]:
    fields.check_keys(ANNOTATIONS, fields.value("annotations"), "annotations")
    fields.check_keys(REASONS, fields.value("cot"), "cot")
    asked, answered = str(chance.settings.version).split("-")
    if asked == "qbp":
        asked = "qb" if chance.random.random() < chance.settings.question_box_prob else "q"
    boxes = _Boxes(_graph(fields, chance) if asked == "qb" or answered in ("bs", "bl") else {})
    question, of_question = fields.plain("question"), []
    if asked == "qb":
        question, of_question = _annotated(fields, "question", boxes)
    reason, of_answer = _reason(fields, answered, boxes)
    answer = f"{reason} The answer is {fields.plain('answer')}.".strip()
    sequences = {"question_boxes": of_question} if of_question else {}
    sequences |= {"answer_boxes": of_answer} if of_answer else {}
    return {
        "image": image_name(fields, "imageId"),
        "target": {"boxes": boxes.used},
        "conversations": turns(chance.question(question=question), answer, **sequences),
    }


def _graph(fields: Fields, chance: Chance) -> dict[str, list[float]]:
    settings = chance.settings
    if settings.scene_graphs is None:
        raise ConfigError(f"grounding.version {settings.version} needs boxes of objects: give grounding.scene_graphs")
    return scene_graphs(settings.scene_graphs, settings.scene_graph_index).boxes(str(fields.value("imageId")))


def _reason(fields: Fields, version: str, boxes: _Boxes) -> tuple[str, list[list[int]]]:
    """What stands before the answer, and its boxes."""
    if version == "a":
        return "", []
    if version in ("l", "bl"):
        return (fields.plain("fullAnswer"), []) if version == "l" else _annotated(fields, "fullAnswer", boxes)
    if version in ("c", "bc"):
        own = fields.boxes("cot.boxes")
        text = MarkedText.read(fields.text("cot.value"), fields.value("cot.seq"), '"cot.value"', len(own))
        keep = (lambda number: [boxes.number(own[place]) for place in text.boxes[number]]) if version == "bc" else None
        return text.written(keep or (lambda number: ()))
    sequence: list[list[int]] = []

    def step(match: re.Match[str]) -> str:
        if version == "s" or match[1] == "-":
            return ""
        sequence.append([boxes.of_object(identity, '"semanticStr"') for identity in match[1].split(",")])
        return f" {BOXES}"

    return OBJECT.sub(step, fields.plain("semanticStr")) + ".", sequence


def _annotated(fields: Fields, name: str, boxes: _Boxes) -> tuple[str, list[list[int]]]:
    """A text with a placeholder behind each annotated group of words."""
    words = fields.plain(name).split(" ")
    found = fields.value(f"annotations.{name}") or {}
    place = f'"annotations.{name}"'
    if not isinstance(found, Mapping):
        raise DataError(f'{place} is {shown(found)}; expected an object such as {{"2": "1231"}}.')
    ends: dict[int, int] = {}
    for span, identity in found.items():
        match = re.fullmatch(r"(\d+)(?::(\d+))?", span)
        last = -1 if match is None else int(match[1]) if match[2] is None else int(match[2]) - 1
        if not 0 <= last < len(words):
            raise DataError(f"{place} names the words {shown(span)} of {len(words)}; expected such as 2 or 2:4.")
        ends[last] = boxes.of_object(str(identity), place)
    text = " ".join(_behind(word, BOXES) if place in ends else word for place, word in enumerate(words))
    return text, [[ends[place]] for place in sorted(ends)]


def _behind(word: str, mark: str) -> str:
    """A mark behind a word and before the sign that ends a sentence."""
    bare = word.rstrip("?.,!;:")
    return bare + mark + word[len(bare) :]


DATASET = PublicSet(
    "gqa",
    keys(
        "a record of gqa",
        *("imageId", "question", "answer", "fullAnswer", "semanticStr", "annotations", "cot"),
        *("semantic", "groups", "entailed", "equivalent", "isBalanced", "types", "questionId"),
    ),
    _item,
    template=ASK,
    placeholders=("<image>", QUESTION),
    versions=tuple(f"{asked}-{answered}" for asked in QUESTIONS for answered in ANSWERS),
    uses=("question_box_prob", "scene_graphs", "scene_graph_index"),
)
