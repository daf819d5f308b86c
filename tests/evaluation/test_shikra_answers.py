"""GQA, POPE and Point-QA in Shikra's form, predictions as JSON lines, and boxes on the page."""

import base64
import io
import json
import re

import pytest
from PIL import Image

import evaluation
from evaluation.benchmarks import find_benchmark
from evaluation.drawing import DrawnBoxes, on_image, with_boxes
from evaluation.outputs import write_outputs
from evaluation.page import render_page
from evaluation.questions import read_questions
from mindspeed_mm.errors import DataError

POPE = {"image": "a.png", "text": "Is there a cat?", "label": "yes"}
GQA = {"imageId": "a", "question": "Which colour?", "answer": "red", "types": {"semantic": "attr"}}
POINT = {
    "file_path": "a.png",
    "question": "Which colour?",
    "point": [100, 50],
    "bbox": [0, 0, 100, 100],
    "answer": "St. 1",
}
TWICE = {key: value for key, value in POINT.items() if key != "question"} | {"general_question": "How many of these?"}


def table_of(tmp_path, *rows):
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (200, 100)).save(tmp_path / name)
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_questions(tmp_path / "questions.jsonl")


@pytest.mark.parametrize(
    ("name", "row", "question"),
    [
        ("pope_shikra", POPE, "<image>\nIs there a cat?"),
        ("GQA_Shikra", GQA, "<image>\nWhich colour?"),
        ("pointqa", POINT, "<image>\nWhich colour? [0.500,0.500]"),
        ("pointqa_box", POINT, "<image>\nWhich colour? [0.000,0.250,0.500,0.750]"),
        ("pointqa_point", TWICE, "<image>\nHow many of these? [0.500,0.500]"),
    ],
)
def test_questions_of_each_set(tmp_path, name, row, question):
    table = table_of(tmp_path, row)
    benchmark = find_benchmark(name, table)
    assert benchmark.prompts(table, "official")[0].turns == ((question, None),)


@pytest.mark.parametrize(
    ("name", "rows", "said", "strict", "compat"),
    [
        ("pope_shikra", [POPE] * 4, ["The answer is yes .", "So the answer is Yes.", "yes", "Answer: yes"], 0.5, 0.5),
        ("gqa_shikra", [GQA] * 2, ["It is. So the answer is red.", "The answer is blue."], 0.5, 0.5),
        # Shikra's rule cuts the right answer at its dot.
        ("pointqa", [POINT] * 2, ["The answer is St. 1.", "The answer is 1."], 0.0, 0.5),
    ],
)
def test_exact_answers(tmp_path, name, rows, said, strict, compat):
    table = table_of(tmp_path, *rows)
    found = [
        evaluation.score(name, dict(enumerate(said)), table.path, mode).table["all"]["accuracy"]
        for mode in ("strict", "compat")
    ]
    assert found == [strict, compat]


def test_what_is_refused(tmp_path):
    for row, name, message in (
        ({"image": "a.png", "label": "yes"}, "pope_shikra", "lacks question, which POPE_Shikra needs"),
        (POINT | {"point": [1, 2, 3]}, "pointqa", r"point is \[1, 2, 3\]; expected 2 numbers in pixels"),
        (POINT | {"bbox": "no"}, "pointqa_box", "bbox is no; expected 4 numbers in pixels"),
        (POINT | {"file_path": "['a.png', 'a.jpg']"}, "pointqa", "found 2 images; expected just one"),
    ):
        with pytest.raises(DataError, match=message):
            find_benchmark(name, table_of(tmp_path, row))
    table = table_of(tmp_path, POPE)
    with pytest.raises(DataError, match="VLMEvalKit has no prompt for POPE_Shikra"):
        find_benchmark("pope_shikra", table).prompts(table, "vlmevalkit")


def test_boxes_are_drawn_where_they_are():
    image = Image.new("RGB", (200, 100))
    assert on_image([0, 0.25, 0.5, 0.75], 200, 100) == [0, 0, 100, 100]
    assert on_image([0, 0, 1, 1], 100, 200) == [0, 0, 100, 200]
    drawn = with_boxes(image, DrawnBoxes([0, 0.25, 0.5, 0.75], [0.75, 0.4, 0.6, 0.6]))
    assert drawn.size == (224, 112)
    assert drawn.getpixel((112, 50))[1] > 100 and drawn.getpixel((60, 50)) == (0, 0, 0)
    red = {x for x in range(224) for y in range(40, 72) if drawn.getpixel((x, y))[0] > 200}
    assert red and all(abs(x - 0.6 * 224) < 4 or abs(x - 0.75 * 224) < 4 for x in red)


def test_the_page_and_the_lines_of_predictions(tmp_path):
    row = {"img_path": "a.png", "expression": "the door", "bbox": [0, 0, 100, 100]}
    table = table_of(tmp_path, row, row)
    answers = {0: "Answer: [0.000,0.250,0.500,0.750] .", 1: "no box"}
    report = find_benchmark("rec", table).score(table, answers, "strict")
    page = render_page(table, answers, report, {"model": "m", "benchmark": "REC", "scores": {}})
    shown = [Image.open(io.BytesIO(base64.b64decode(text))) for text in re.findall(r"image/jpeg;base64,([^\"]+)", page)]
    assert [image.size for image in shown] == [(224, 112)] * 2 and "red and dashed" in page
    (tmp_path / "out").mkdir()
    files = write_outputs(tmp_path / "out", "m_REC", table, answers, report, {})
    lines = files["extra_prediction"].read_text().splitlines()
    assert files["extra_prediction"].name == "m_REC_extra_prediction.jsonl"
    assert [json.loads(line)["pred"] for line in lines] == list(answers.values())
    assert {json.loads(line)["target"] for line in lines} == {answers[0]}
    assert files["predictions"].suffix == ".xlsx"
