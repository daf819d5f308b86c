"""VCR with its boxes: why do people do what they do? Question, four answers, four rationales.

{"img_fn": "a.jpg", "boxes": [[24, 63, 76, 113, 0.99]], "question": ["Why", "is", [0], "here", "?"], "answer_choices":
[["To", "wait", "."], ..], "answer_label": 0, "rationale_choices": [..], "rationale_label": 2}

A list among the words names boxes. The version says what is asked and answered: q the question, a the right answer, r
the right rationale, c a choice among four. q-a, q-ra, qa-r and q-a-q-r (two questions) without choices; qc-a, qc-ra,
qc-rac, qac-r and qc-a-qc-r with them. An evaluation of answers takes qc-a, one of rationales qac-r. With each_answer, a
record is taken four times, its first answer given, then its second and so on: rationales of whatever a model may have
chosen.
"""

from __future__ import annotations

from typing import Any

from mindspeed_mm.data.chosen_records import Choose
from mindspeed_mm.data.conversation import shown
from mindspeed_mm.data.datasets.vqa_v2 import ASK
from mindspeed_mm.data.grounding.item import BOXES, QUESTION
from mindspeed_mm.data.grounding.parameters import GroundingParameters
from mindspeed_mm.data.grounding.reading import Chance, Fields, PublicSet, without_placeholders
from mindspeed_mm.data.keys import keys
from mindspeed_mm.errors import ConfigError, DataError

LETTERS = "ABCD"
CHOOSE = "Answer with the letter of the right option."
EXPLAIN = "Why is that so?"
CHOOSE_REASON = "Which option explains it? Answer with its letter."

Piece = tuple[str, list[list[int]]]
"""A text and the boxes of its placeholders."""

VERSIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "q-a": (("question",), ("answer",)),
    "q-ra": (("question",), ("rationale", "answer")),
    "qc-a": (("question", "answers", "choose"), ("letter",)),
    "qc-ra": (("question", "answers", "choose"), ("rationale", "letter")),
    "qc-rac": (("question", "answers", "choose"), ("rationale", "answer", "letter")),
    "qa-r": (("question", "given", "explain"), ("rationale",)),
    "q-a-q-r": (("question",), ("answer",), ("explain",), ("rationale",)),
    "qac-r": (("question", "given", "rationales", "choose_reason"), ("rationale_letter",)),
    "qc-a-qc-r": (
        ("question", "answers", "choose"),
        ("letter",),
        ("rationales", "choose_reason"),
        ("rationale_letter",),
    ),
}
"""What stands in each turn, the human's first."""


def _item(fields: Fields, chance: Chance) -> dict[str, Any]:
    boxes = fields.items("boxes")
    pieces = _pieces(fields, len(boxes))
    talk = []
    for number, names in enumerate(VERSIONS[str(chance.settings.version)]):
        texts, groups = zip(*(pieces[name] for name in names), strict=True)
        sequence = [group for own in groups for group in own]
        text = " ".join(texts) if number % 2 else "\n".join(texts)
        text = chance.question(question=text) if number == 0 else text
        turn: dict[str, Any] = {"from": ("human", "gpt")[number % 2], "value": text}
        talk.append(turn | ({"boxes_seq": sequence} if sequence else {}))
    target = [box[:4] if isinstance(box, list) else box for box in boxes]  # a box's fifth number is its score
    return {"image": fields.text("img_fn"), "target": {"boxes": target}, "conversations": talk}


def _pieces(fields: Fields, count: int) -> dict[str, Piece]:
    answers, answer = _choices(fields, "answer", count)
    rationales, rationale = _choices(fields, "rationale", count)
    given, boxes = answers[answer]
    return {
        "question": _sentence(fields.items("question"), '"question"', count),
        "answer": answers[answer],
        "given": (f"Answer: {given}", boxes),
        "rationale": rationales[rationale],
        "answers": _options(answers),
        "rationales": _options(rationales),
        "letter": (f"The answer is ({LETTERS[answer]}).", []),
        "rationale_letter": (f"The answer is ({LETTERS[rationale]}).", []),
        "choose": (CHOOSE, []),
        "explain": (EXPLAIN, []),
        "choose_reason": (CHOOSE_REASON, []),
    }


def _choices(fields: Fields, name: str, count: int) -> tuple[list[Piece], int]:
    """The four choices and the number of the right one."""
    found, label = fields.items(f"{name}_choices"), fields.value(f"{name}_label")
    if len(found) != len(LETTERS) or type(label) is not int or not 0 <= label < len(found):
        raise DataError(
            f'"{name}_choices" has {len(found)} entries and "{name}_label" is {shown(label)}; expected four, and the '
            "number of the right one, 0 to 3."
        )
    places = [f'"{name}_choices"[{number}]' for number in range(len(found))]
    return [_sentence(words, place, count) for words, place in zip(found, places, strict=True)], label


def _sentence(words: Any, place: str, count: int) -> Piece:
    """Words joined by spaces, a placeholder for each list of boxes."""
    if not isinstance(words, list) or not words or not all(isinstance(word, str | list) for word in words):
        raise DataError(f'{place} is {shown(words)}; expected a list such as ["Why", "is", [0], "here", "?"].')
    groups = [word for word in words if isinstance(word, list)]
    if any(type(number) is not int or not 0 <= number < count for group in groups for number in group):
        raise DataError(f"{place} names boxes {shown(groups)}, and there are {count}, counted from 0; correct either.")
    texts = [BOXES if isinstance(word, list) else without_placeholders(word, place) for word in words]
    return " ".join(texts), groups


def _options(choices: list[Piece]) -> Piece:
    text = " ".join(f"({letter}) {choice[0]}" for letter, choice in zip(LETTERS, choices, strict=True))
    return text, [group for choice in choices for group in choice[1]]


def _choose(settings: GroundingParameters) -> tuple[Choose, dict[str, Any]] | None:
    if not settings.each_answer:
        return None
    if "given" not in VERSIONS[str(settings.version)][0]:
        raise ConfigError(
            f"grounding.each_answer gives each answer in the question, which version {settings.version} does not hold; "
            'set "version": "qac-r" or "qa-r", or remove the key'
        )
    return _with_each_answer, {"each_answer": True}


def _with_each_answer(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [record | {"answer_label": number} for number in range(len(LETTERS))]


DATASET = PublicSet(
    "vcr",
    keys(
        "a record of vcr",
        *("img_fn", "boxes", "question", "answer_choices", "answer_label", "rationale_choices", "rationale_label"),
        *("objects", "names", "movie", "metadata_fn", "segms", "annot_id", "img_id", "match_fold", "match_index"),
    ),
    _item,
    template=ASK,
    placeholders=("<image>", QUESTION),
    versions=tuple(VERSIONS),
    uses=("each_answer",),
    choose=_choose,
)
