"""Records that a set leaves out by their length, or takes several times: REG and VCR."""

import json
import pickle

import pytest
from PIL import Image

from mindspeed_mm.data.chosen_records import ChosenRecords
from mindspeed_mm.errors import ConfigError, DataError
from tests.grounding.test_public_sets import records
from tests.grounding.test_reasoned_sets import MONEY, PAYS, VCR, WHY

LENGTHS = ("door", "red door", "the red door", "a very red door")


def rows(*expressions):
    return [{"img_path": "7.jpg", "expression": text, "bbox": [0, 0, 9, 9]} for text in expressions]


@pytest.fixture(autouse=True)
def image(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "7.jpg")


@pytest.mark.parametrize(
    ("bounds", "left"),
    [
        ({"caption_min_words": 1}, [1, 2, 3]),
        ({"caption_max_words": 3}, [0, 1]),
        ({"caption_min_words": 1, "caption_max_words": 4}, [1, 2]),
        ({"caption_min_words": 0}, [0, 1, 2, 3]),
    ],
)
def test_expressions_between_the_bounds(tmp_path, bounds, left, caplog):
    caplog.set_level("INFO", "mindspeed_mm")
    source = records(tmp_path, "reg", rows(*LENGTHS), bounds)
    found = [source[number] for number in range(len(source))]
    assert [sample.turns[1].text for sample in found] == [LENGTHS[number] for number in left]
    assert [sample.where.rpartition(" ")[2] for sample in found] == [str(number) for number in left]
    assert (f"{4 - len(left)} of 4 records are left out" in caplog.text) == (len(left) < 4)


def test_bounds_that_leave_nothing(tmp_path):
    with pytest.raises(DataError, match=r"none of 4 records is left by {'caption_min_words': 9.*; correct these keys"):
        records(tmp_path, "reg", rows(*LENGTHS), {"caption_min_words": 9})
    with pytest.raises(ConfigError, match="caption_min_words 3 and caption_max_words 4 leave no length between them"):
        records(tmp_path, "reg", rows(*LENGTHS), {"caption_min_words": 3, "caption_max_words": 4})
    with pytest.raises(ConfigError, match="rec does not read grounding.caption_min_words"):
        records(tmp_path, "rec", rows(*LENGTHS), {"caption_min_words": 3})


def test_a_broken_record_behind_one_that_is_left_out(tmp_path):
    with pytest.raises(DataError, match=r'reg.jsonl: record 1, line 2: "expression" is 3; expected a text'):
        records(tmp_path, "reg", rows("door", 3), {"caption_min_words": 1})


def test_each_answer_of_vcr_is_given_once(tmp_path):
    source = records(tmp_path, "vcr", [VCR, VCR], {"version": "qa-r", "each_answer": True})
    assert len(source) == 8
    answers = ["To wait", PAYS, "No", "Yes"]
    for number in range(8):
        sample = source[number]
        assert f"{WHY}\nAnswer: {answers[number % 4]}\nWhy is that so?" in sample.turns[0].text
        assert sample.turns[1].text == MONEY and sample.where.endswith(f"record {number // 4}")
    with pytest.raises(ConfigError, match="which version q-a does not hold; set .version.: .qac-r. or .qa-r."):
        records(tmp_path, "vcr", [VCR], {"each_answer": True})


def twice(record):
    return [record, record]


def test_parquet_and_pickles(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"n": 1}, {"n": 2}]), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"n": n}) + "\n" for n in (1, 2)))
    for name, lines in (("a.parquet", [0, 0]), ("a.jsonl", [1, 2])):
        chosen = ChosenRecords(str(tmp_path / name), choose=twice, key={})
        again = pickle.loads(pickle.dumps(chosen))
        assert [record["n"] for record in map(again.__getitem__, range(4))] == [1, 1, 2, 2]
        assert [chosen.verified(3)["n"], chosen.line(1), chosen.line(3)] == [2, *lines]
