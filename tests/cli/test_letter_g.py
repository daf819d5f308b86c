"""Letter G: a bad line fails alone, under its own id."""

import json

import pytest

from evaluation.predictions import match_predictions
from evaluation.tsv import read_table
from mindspeed_mm.data.config import BasicParameters
from mindspeed_mm.data.datasets._files import ReadOptions
from mindspeed_mm.data.datasets.llava import DATASET
from mindspeed_mm.data.template import get_template
from mindspeed_mm.errors import DataError
from mindspeed_mm.inference.request_file import read_requests
from tests.evaluation.evaluation_helpers import choice_rows, write_table


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_letter_g_requests_keep_their_ids(tmp_path):
    """A bad line's id is its own, so that no good line with the number of the bad one ends the command."""
    bad = {"id": 1, "promt": "Hi"}
    found = read_requests(lines(tmp_path / "r.jsonl", {"id": 0, "prompt": "Hi"}, bad, {"id": 2, "prompt": "Hi"}))
    assert list(found) == ["0", "1", "2"]
    assert [isinstance(line, DataError) for line in found.values()] == [False, True, False]
    assert "line 2 (id 1)" in str(found["1"])


def test_letter_g_requests_without_an_id_give_way(tmp_path):
    """Their number is their id, unless another line has it."""
    found = read_requests(lines(tmp_path / "r.jsonl", {"prompt": "a"}, {"id": "1", "prompt": "b"}, {"prompt": "c"}))
    assert {name: line.prompt for name, line in found.items()} == {"line 1": "a", "1": "b", "3": "c"}


def test_letter_g_records_keep_their_ids(tmp_path):
    good = {"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    path = lines(tmp_path / "d.jsonl", good, good | {"id": "seven", "image": "../x.png"}, good)
    problems = []
    options = ReadOptions(get_template("v1"), None, True, "error", problems)
    source = DATASET(BasicParameters(data_path=str(path), data_folder=str(tmp_path)), options)
    assert [source[0].id, source[2].id] == ["a", "a"]
    with pytest.raises(DataError, match=r"record 1 \(id seven\): "):
        source[1]


def test_letter_g_predictions_keep_their_ids(tmp_path):
    """Every bad answer is told at once, each by its index."""
    table = read_table(write_table(tmp_path / "MMBench_DEV_EN.tsv", choice_rows(3)))
    answers = [{"index": table.rows[0].index, "prediction": 3}, {"index": table.rows[1].index, "predicton": "A"}]
    with pytest.raises(DataError) as error:
        match_predictions(answers, table)
    assert f"the answer of index {table.rows[0].index} is 3" in str(error.value)
    assert f"record 1 (index {table.rows[1].index}): found" in str(error.value)


def test_letter_g_rows_of_a_table_keep_their_ids(tmp_path):
    rows = choice_rows(3)
    rows[1]["image"] = "no image at all"
    with pytest.raises(DataError, match=f"index {rows[1]['index']}"):
        read_table(write_table(tmp_path / "MMBench_DEV_EN.tsv", rows))
