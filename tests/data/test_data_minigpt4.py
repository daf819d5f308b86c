"""MiniGPT-4's records as turns."""

import json

import pytest

from mindspeed_mm.data.config import BasicParameters
from mindspeed_mm.data.datasets._files import ReadOptions
from mindspeed_mm.data.datasets.minigpt4 import DATASET, QUESTIONS
from mindspeed_mm.data.template import get_template
from mindspeed_mm.errors import DataError


def records(tmp_path, *rows):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return DATASET(
        BasicParameters(data_path=str(path), data_folder=str(tmp_path)), ReadOptions(get_template("minigpt4_vicuna"))
    )


def test_captions_get_one_of_four_questions(tmp_path):
    rows = [{"image_id": str(number), "caption": "A cat."} for number in range(20)]
    found = records(tmp_path, *rows)
    asked = [found[number].turns[0].text.removeprefix("<image>\n") for number in range(20)]
    assert set(asked) == set(QUESTIONS)
    assert asked == [records(tmp_path, *rows)[number].turns[0].text.removeprefix("<image>\n") for number in range(20)]
    assert found[3].images == (f"{tmp_path}/3.jpg",) and found[3].turns[1].text == "A cat."


def test_instructions(tmp_path):
    row = {"image": "a.png", "instruction_input": "<Img><ImageHere></Img> [vqa] Why? ", "answer": "So."}
    (sample,) = [records(tmp_path, row)[0]]
    assert sample.turns[0].text == "<image>\n[vqa] Why?" and sample.images == (f"{tmp_path}/a.png",)


def test_broken_records_are_refused(tmp_path):
    twice = {"image": "a.png", "instruction_input": "<ImageHere> and <ImageHere>", "answer": "So."}
    with pytest.raises(DataError, match="holds 2 <ImageHere>, and the record has one image"):
        records(tmp_path, twice)
    with pytest.raises(DataError, match="expected a record such as"):
        records(tmp_path, {"image": "a.png", "answer": "So."})
    with pytest.raises(DataError, match="expected a record such as"):
        records(tmp_path, {"caption": "So."})
