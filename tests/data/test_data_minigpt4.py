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


def read(path):
    return DATASET(
        BasicParameters(data_path=str(path), data_folder=str(path.parent)), ReadOptions(get_template("minigpt4_vicuna"))
    )


def test_the_list_inside_filter_cap(tmp_path):
    rows = [{"image_id": "7", "caption": "A cat."}, {"image_id": "8", "caption": "A dog."}]
    path = tmp_path / "filter_cap.json"
    path.write_text(json.dumps({"annotations": rows}))
    found = read(path)
    assert len(found) == 2 and found[1].images == (f"{tmp_path}/8.jpg",) and found[1].turns[1].text == "A dog."
    for content, message in (
        ('{"annotations": 1}', '"annotations" is 1; expected a list of records'),
        ('{"annotations": []}', "expected a list of records"),
        ('{"annotations": [{}', "filter_cap.json is not JSON"),
        ('{"annotations": [1]}', "record 0 of its annotations is 1; expected an object"),
        ('{"annotations": [{"caption": "x"}]}', "record 0 of its annotations: is .*expected a record such as"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            read(path)
    with pytest.raises(DataError, match="cannot read the data file .*none.json"):
        read(tmp_path / "none.json")


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
    both = {"image": "a.png", "caption": "A cat.", "instruction_input": "Why?", "answer": "So."}
    with pytest.raises(DataError, match='has "caption" beside "instruction_input" and "answer"'):
        records(tmp_path, both)
    with pytest.raises(DataError, match='did you mean "caption"'):
        records(tmp_path, {"image_id": "3", "caption": "A cat.", "captions": "A dog."})
