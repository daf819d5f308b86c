"""MME: points of pairs of questions on an image."""

import pytest
from evaluation_helpers import FakeEngine, image_cell, write_table

import mindspeed_mm as mm
from evaluation.runner import run

SAID = {
    "OCR": (("Yes", "No"), ("yes.", "Yes"), ("maybe", "no")),
    "color": (("No", "No"), ("Yes", "No, it is not.")),
    "code_reasoning": (("Yes", "No"), ("Nope", "Yes")),
}
"""Answers to the question whose answer is Yes and the one whose answer is No, per image."""


@pytest.fixture
def table(tmp_path):
    rows, answers = [], {}
    for category, images in SAID.items():
        for number, pair in enumerate(images):
            for truth, said in zip(("Yes", "No"), pair, strict=True):
                index = len(rows)
                question = f"Is it {truth}? Please answer yes or no."
                path = f"{category}/{number}.jpg"
                row = {"index": index, "image": image_cell(), "image_path": path, "question": question}
                rows.append(row | {"answer": truth, "category": category})
                answers[index] = said
    return write_table(tmp_path / "MME.tsv", rows), answers


@pytest.mark.parametrize("mode", ["strict", "compat"])
def test_points(table, mode):
    path, answers = table
    report = mm.score("mme", answers, path, mode)
    (line,) = report.table.values()
    points = {
        "OCR": 100 * (4 / 6 + 1 / 3),
        "color": 100 * (3 / 4 + 1 / 2),
        "code_reasoning": 100 * (2 / 4 + 1 / 2),
    }
    assert {name: line[name] for name in points} == pytest.approx(points)
    assert line["perception"] == pytest.approx(points["OCR"] + points["color"]) == report.overall
    assert line["reasoning"] == pytest.approx(points["code_reasoning"])
    assert report.unparsed == {"strict": 1, "compat": 2}[mode], "compat does not read Nope"


def test_llavas_instruction_takes_the_place_of_mmes_own(table, tmp_path):
    path, answers = table
    engine = FakeEngine(answers)
    run("mme", path, engine, tmp_path / "official", model="m", progress=False, limit=1)
    run("mme", path, engine, tmp_path / "kit", model="m", progress=False, limit=1, prompt_style="vlmevalkit")
    official, kit = engine.asked
    text = "Is it Yes?\nAnswer the question using a single word or phrase."
    assert official.turns == ((f"<image>\n{text}", None),)
    assert kit.text.endswith("Is it Yes? Please answer yes or no. ASSISTANT: ")
