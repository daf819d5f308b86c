"""Captions: words, CIDEr and BLEU as pycocoevalcap has them, and the benchmarks that use them."""

import json
import math
import re

import pytest
from evaluation_helpers import FakeEngine, image_cell, write_table

import mindspeed_mm as mm
from evaluation.benchmarks import find_benchmark
from evaluation.questions import read_questions
from evaluation.runner import run
from evaluation.scorers.captions import Caption, caption_scores, caption_words
from mindspeed_mm.errors import DataError
from tests.helpers.reference import DATA

GOLDEN = json.loads((DATA / "golden_captions" / "captions.json").read_text())


@pytest.mark.parametrize(("text", "words"), GOLDEN["tokens"])
def test_words_are_those_of_the_java_tokenizer(text, words):
    assert caption_words(f"{text}</s>") == words


@pytest.mark.parametrize(("key", "split"), [("tokenized", caption_words), ("split", str.split)])
def test_scores_are_those_of_pycocoevalcap(key, split):
    captions = [
        Caption(split(answer), [split(text) for text in references])
        for answer, references in zip(GOLDEN["answers"], GOLDEN["references"], strict=True)
    ]
    found, expected = caption_scores(captions), GOLDEN[key]
    assert found.bleu == pytest.approx(expected["bleu"], rel=1e-12)
    assert found.cider == pytest.approx(expected["cider"], rel=1e-12)
    assert found.ciders == pytest.approx(expected["ciders"], rel=1e-12)


def test_worked_by_hand():
    """Two images, one reference each. "a cat" is right; "a" is in both references, so its weight is 0."""
    scores = caption_scores([Caption(["a", "cat"], [["a", "cat"]]), Caption(["a"], [["a", "dog", "sits"]])])
    # Both of the first image's orders of runs are equal to the reference's; orders 3 and 4 have none.
    assert scores.ciders == pytest.approx((10 * 2 / 4, 0))
    # Right runs of one word: 3 of 3. Lengths: 3 against 2 + 3.
    assert scores.bleu[0] == pytest.approx(math.exp(1 - 5 / 3), rel=1e-6)
    # One run of two words, in the first answer.
    assert scores.bleu[1] == pytest.approx(math.exp(1 - 5 / 3), rel=1e-6) and scores.bleu[3] < 1e-3


def test_nothing_to_score():
    for captions in ([], [Caption(["a"], [])]):
        with pytest.raises(ValueError, match="expected at least one, each with a reference or more"):
            caption_scores(captions)


def caption_rows():
    return [
        {"index": str(number), "image": image_cell(size=(4 + number, 3)), "answer": repr(references), "split": split}
        for number, (references, split) in enumerate(
            zip(GOLDEN["references"], ["val", "val", "test", "test", "test", "val"], strict=True)
        )
    ]


def test_a_table_is_asked_and_scored_in_both_modes(tmp_path):
    path = write_table(tmp_path / "mine.tsv", caption_rows())
    engine = FakeEngine(dict(enumerate(GOLDEN["answers"])))
    result = run("captions", path, engine, tmp_path, model="m", progress=False)
    strict, compat = result.reports["strict"], result.reports["compat"]
    assert strict.overall == pytest.approx(GOLDEN["tokenized"]["cider"]) and strict.metric == "CIDEr"
    assert compat.overall == pytest.approx(GOLDEN["split"]["cider"])
    assert strict.table["all"]["BLEU-4"] == pytest.approx(100 * GOLDEN["tokenized"]["bleu"][3])
    assert strict.rows[1].score == pytest.approx(GOLDEN["tokenized"]["ciders"][1]) and strict.unparsed == 1
    assert set(strict.table) == {"all", "test", "val"} and strict.table["val"]["CIDEr"] != strict.table["all"]["CIDEr"]
    low, high = strict.table_intervals["all"]["CIDEr"]
    assert low < strict.table["all"]["CIDEr"] < high
    assert engine.asked[0].turns == (("<image>\nProvide a one-sentence caption for the provided image.", None),)
    # The page's track ends where the best interval does: no bar is cut at CIDEr 1.
    page = (tmp_path / "m_captions_report.html").read_text()
    width = re.search(r'title="253\.2 \(([\d.]+) to ([\d.]+)\)"><i style="width: ([\d.]+)%', page)
    assert float(width[3]) == pytest.approx(100 * 253.19 / float(width[2]), abs=0.1) and "BLEU-4" in page


def test_own_question_and_styles(tmp_path):
    rows = [row | {"question": "What is there?"} for row in caption_rows()]
    table = read_questions(write_table(tmp_path / "q.tsv", rows))
    benchmark = find_benchmark("coco-val", table)
    assert benchmark.name == "COCO_VAL"
    assert benchmark.prompts(table, "official")[0].turns[0][0] == "<image>\nWhat is there?"
    assert "What is there?" in benchmark.prompts(table, "vlmevalkit")[0].text
    plain = read_questions(write_table(tmp_path / "p.tsv", caption_rows()))
    assert "Please describe this image in general. Directly" in benchmark.prompts(plain, "vlmevalkit")[0].text


def test_tables_that_are_no_captions(tmp_path):
    rows = caption_rows()
    rows[1]["answer"] = ""
    with pytest.raises(DataError, match="row with index 1: the answer is empty, but other rows have one"):
        find_benchmark("nocaps", read_questions(write_table(tmp_path / "a.tsv", rows)))
    rows[1]["answer"] = "[]"
    with pytest.raises(DataError, match="row with index 1: the answer is an empty list; give at least one caption"):
        find_benchmark("flickr30k", read_questions(write_table(tmp_path / "b.tsv", rows)))
    bare = [{key: row[key] for key in ("index", "image")} for row in rows]
    with pytest.raises(DataError, match="has no captions in column answer"):
        mm.score("captions", dict(enumerate(GOLDEN["answers"])), write_table(tmp_path / "c.tsv", bare))
