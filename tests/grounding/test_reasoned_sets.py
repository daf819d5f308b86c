"""CLEVR, VCR and ScienceQA: a small file in each one's form, to questions, answers, boxes and points."""

import json

import pytest
from PIL import Image

from mindspeed_mm.errors import ConfigError, DataError
from tests.grounding.test_public_sets import ASK, BOX, BOX2, SEEN, SEEN2, records

PROGRAM = [
    {"function": "scene", "inputs": [], "ans": [0, 1]},
    {"function": "filter_shape", "inputs": [0], "value_inputs": ["cube"], "ans": [1, 0]},
    {"function": "count", "inputs": [1], "ans": 2},
]
CLEVR = {"image_filename": "7.jpg", "image_index": 1, "question": "How many cubes?", "answer": "2", "program": PROGRAM}
STEPS = "scene -> filter_shape:cube[0]{} -> count[1] The answer is 2."
POINTS = " [0.00,0.25;0.50,0.50]"
VCR = {
    "img_fn": "7.jpg",
    "boxes": [[*BOX, 0.9], [*BOX2, 0.8]],
    "question": ["Why", "is", [0], "with", [0, 1], "?"],
    "answer_choices": [["To", "wait"], [[1], "pays"], ["No"], ["Yes"]],
    "answer_label": 1,
    "rationale_choices": [["Rain"], ["Sun"], ["Money", "of", [0]], ["Fun"]],
    "rationale_label": 2,
}
WHY, PAYS, MONEY = f"Why is {SEEN} with {SEEN[:-1]};{SEEN2[1:]} ?", f"{SEEN2} pays", f"Money of {SEEN}"
CHOICES = f"(A) To wait (B) {PAYS} (C) No (D) Yes\nAnswer with the letter of the right option."
REASONS = f"(A) Rain (B) Sun (C) {MONEY} (D) Fun\nWhich option explains it? Answer with its letter."
SCIENCE = {"id": 3, "image": "7.jpg", "question": "Solid?", "choices": ["rice", "milk"], "answer": 0, "hint": "Look."}
SCIENCE |= {"lecture": "A solid stays.", "solution": "Rice does."}
ASKED = "Look.\nSolid?\nA. rice\nB. milk"


@pytest.fixture
def scenes(tmp_path):
    """A folder with an image and two scenes."""
    Image.new("RGB", (200, 100)).save(tmp_path / "7.jpg")
    objects = [{"pixel_coords": [100, 50, 11.5]}, {"pixel_coords": [0, 0, 9.0]}]
    found = [{"image_filename": "6.jpg", "objects": []}, {"image_filename": "7.jpg", "objects": objects}]
    (tmp_path / "scenes.jsonl").write_text("".join(json.dumps(scene) + "\n" for scene in found))
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "record", "version", "texts"),
    [
        ("clevr", CLEVR, "q-a", [ASK.format("How many cubes?"), "The answer is 2."]),
        ("clevr", CLEVR, "q-s", [ASK.format("How many cubes?"), STEPS.format("")]),
        ("clevr", CLEVR, "q-bs", [ASK.format("How many cubes?"), STEPS.format(POINTS)]),
        ("vcr", VCR, "q-a", [ASK.format(WHY), PAYS]),
        ("vcr", VCR, "q-ra", [ASK.format(WHY), f"{MONEY} {PAYS}"]),
        ("vcr", VCR, "qc-a", [ASK.format(f"{WHY}\n{CHOICES}"), "The answer is (B)."]),
        ("vcr", VCR, "qc-ra", [ASK.format(f"{WHY}\n{CHOICES}"), f"{MONEY} The answer is (B)."]),
        ("vcr", VCR, "qc-rac", [ASK.format(f"{WHY}\n{CHOICES}"), f"{MONEY} {PAYS} The answer is (B)."]),
        ("vcr", VCR, "qa-r", [ASK.format(f"{WHY}\nAnswer: {PAYS}\nWhy is that so?"), MONEY]),
        ("vcr", VCR, "q-a-q-r", [ASK.format(WHY), PAYS, "Why is that so?", MONEY]),
        ("vcr", VCR, "qac-r", [ASK.format(f"{WHY}\nAnswer: {PAYS}\n{REASONS}"), "The answer is (C)."]),
        (
            "vcr",
            VCR,
            "qc-a-qc-r",
            [ASK.format(f"{WHY}\n{CHOICES}"), "The answer is (B).", REASONS, "The answer is (C)."],
        ),
        ("science_qa", SCIENCE, "a", [ASK.format(ASKED), "The answer is A."]),
        ("science_qa", SCIENCE, "c", [ASK.format(ASKED), "A solid stays. Rice does. The answer is A."]),
        ("science_qa", SCIENCE | {"image": None, "hint": ""}, "a", ["Solid?\nA. rice\nB. milk", "The answer is A."]),
    ],
)
def test_every_version(scenes, kind, record, version, texts):
    graphs = {"scene_graphs": str(scenes / "scenes.jsonl")} if kind == "clevr" else {}
    sample = records(scenes, kind, [record], {"version": version} | graphs)[0]
    assert [turn.text for turn in sample.turns] == texts
    assert len(sample.images) == ("<image>" in texts[0])


def step(**changes):
    return CLEVR | {"program": [PROGRAM[0], PROGRAM[1] | changes, PROGRAM[2]]}


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        (
            "clevr",
            CLEVR | {"image_index": 0},
            "line 1 of .* is the scene of '6.jpg', and the record asks about '7.jpg'",
        ),
        ("clevr", CLEVR | {"image_index": 5}, '"image_index" is 5, and .* has 2 scenes'),
        ("clevr", step(ans=[4]), r'"program"\[1\].ans names object 4, and the scene has 2'),
        ("clevr", step(ans="x"), r'"program"\[1\].ans is \'x\'; expected the numbers'),
        ("clevr", step(inputs=3), r'"program"\[1\] is .*; expected {"function"'),
        ("vcr", VCR | {"question": ["Who", [5]]}, r'"question" names boxes \[\[5\]\], and there are 2'),
        ("vcr", VCR | {"question": "Who?"}, "is 'Who\\?'; expected a list"),
        ("vcr", VCR | {"question": [3]}, r'"question" is \[3\]; expected a list such as'),
        ("vcr", VCR | {"answer_label": 4}, '"answer_label" is 4; expected four'),
        ("science_qa", SCIENCE | {"answer": 2}, '"choices" has 2 entries and "answer" is 2'),
        ("science_qa", SCIENCE | {"choices": ["a", 3]}, r'"choices"\[1\] is 3; expected a text'),
    ],
)
def test_a_broken_record(scenes, kind, record, message):
    settings = {"version": "q-bs", "scene_graphs": str(scenes / "scenes.jsonl")} if kind == "clevr" else {}
    with pytest.raises(DataError, match=rf"(?s){kind}\.jsonl.*line 1.*{message}"):
        records(scenes, kind, [record], settings)


def test_points_need_scenes(scenes):
    with pytest.raises(ConfigError, match="q-bs needs points of objects: give grounding.scene_graphs"):
        records(scenes, "clevr", [CLEVR], {"version": "q-bs"})
    nothing = records(
        scenes, "clevr", [step(ans=[])], {"version": "q-bs", "scene_graphs": str(scenes / "scenes.jsonl")}
    )
    assert nothing[0].turns[1].text == STEPS.format(" found nothing")
