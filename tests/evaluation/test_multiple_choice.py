"""Prompts and scores of multiple-choice tables, against VLMEvalKit's and on tables of one's own."""

import pytest
from evaluation_helpers import choice_rows, image_cell, write_table

import evaluation
from evaluation.benchmarks import find_benchmark, known_benchmarks
from evaluation.report import Rows
from evaluation.tsv import read_table
from mindspeed_mm.errors import DataError


def test_official_prompt_keeps_the_text_of_the_table(table_path):
    table = read_table(table_path)
    prompts = find_benchmark("mine", table).prompts(table, "official")
    assert prompts[0].text is None
    assert prompts[0].turns == (
        (
            "<image>\nQuestion 0?\nA. cat\nB. dog\nC. None\n"
            "Answer with the option's letter from the given choices directly.",
            None,
        ),
    )


def test_hint_images_chinese_and_open_questions(tmp_path):
    rows = [row | {"hint": "", "image": image_cell()} for row in choice_rows(3)]
    rows[0]["hint"] = "Look twice."
    rows[1] |= {"question": "\u8fd9\u662f\u4ec0\u4e48\uff1f", "image": repr([image_cell(), image_cell()])}
    rows[2] |= {"A": "", "B": "", "C": ""}
    table = read_table(write_table(tmp_path / "t.tsv", rows))
    prompts = find_benchmark("mine", table).prompts(table, "official")
    texts = [prompts[index].turns[0][0] for index in range(3)]
    assert texts[0].startswith("<image>\nLook twice.\nQuestion 0?\nA. cat")
    assert texts[1].startswith("<image>\n<image>\n\u8fd9")
    assert texts[1].endswith("\u8bf7\u76f4\u63a5\u56de\u7b54\u9009\u9879\u5b57\u6bcd\u3002")
    assert texts[2].endswith("?\nAnswer the question directly.")


def test_text_with_an_image_tag_is_refused(tmp_path):
    rows = choice_rows(1)
    rows[0]["question"] = "What is in <image>?"
    table = read_table(write_table(tmp_path / "t.tsv", rows))
    with pytest.raises(DataError, match="row with index 0: the text holds <image>"):
        find_benchmark("mine", table).prompts(table, "official")


def test_a_table_of_ones_own_is_scored_without_code(table_path):
    answers = {index: "A" if index % 2 == 0 else "dog" for index in range(6)} | {4: "no idea"}
    report = evaluation.score("digits", answers, table_path)
    assert report.benchmark == "digits"
    assert report.table == {"none": {"Overall": 5 / 6, "x": 0.75, "y": 1.0}}
    assert (report.n, report.unparsed, report.overall) == (6, 1, 5 / 6)
    low, high = report.interval
    assert 0.3 < low < 5 / 6 < high <= 1
    assert report.rows["4"] == report.rows[4] == (None, 0, "no single option could be read")


def test_splits_and_categories_that_a_split_lacks(tmp_path):
    rows = [row | {"split": "dev" if row["index"] == "0" else "test", "l2-category": "big"} for row in choice_rows(3)]
    rows[2]["category"] = ""
    report = evaluation.score("mine", dict.fromkeys(range(3), "A"), write_table(tmp_path / "t.tsv", rows))
    assert list(report.table) == ["dev", "test"]
    assert report.table["test"]["big"] == 0.5
    assert report.to_csv().splitlines() == [
        '"split","Overall","big","x","y"',
        '"dev","1.0","1.0","","1.0"',
        '"test","0.5","0.5","0.0",""',
    ]
    assert report.to_json()["table"]["dev"]["x"] is None


def test_compat_loses_what_the_kit_loses(tmp_path):
    rows = choice_rows(2)
    rows[0] |= {"B": "None", "answer": "B"}
    path = write_table(tmp_path / "t.tsv", rows)
    answers = {0: "B", 1: "B"}
    assert evaluation.score("mine", answers, path, "strict").rows[0].hit == 1
    assert evaluation.score("mine", answers, path, "compat").rows[0][:2] == ("Z", 0)


def test_names_of_modules_are_found_in_any_case(table_path):
    assert {"ai2d_test", "scienceqa_test"} <= set(known_benchmarks())
    table = read_table(table_path)
    assert find_benchmark("Ai2D_test", table).name == "AI2D_TEST"


def rotated(rows):
    return [rows[0], rows[0] | {"index": str(1_000_000 + int(rows[0]["index"]))}]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ai2d_tst", lambda rows: [{k: v for k, v in row.items() if k != "B"} for row in rows], "nearest: ai2d_test"),
        ("ai2d_test", lambda rows: [{k: v for k, v in row.items() if k != "B"} for row in rows], "lacks column B"),
        (
            "mine",
            lambda rows: [row | {"answer": "cat"} for row in rows],
            'index 0: the answer is "cat"; expected the letter',
        ),
        ("mine", rotated, r"rotated forms \(1 rows\)"),
    ],
)
def test_tables_that_are_no_plain_choice_are_refused(tmp_path, name, change, message):
    path = write_table(tmp_path / "t.tsv", change(choice_rows(2)))
    with pytest.raises(DataError, match=message):
        evaluation.score(name, {0: "A", 1: "A"}, path)


def test_scoring_needs_answers_and_a_known_mode(tmp_path):
    path = write_table(tmp_path / "t.tsv", [row | {"answer": ""} for row in choice_rows(2)])
    with pytest.raises(DataError, match="no .or empty. answers in column answer"):
        evaluation.score("mine", {0: "A", 1: "A"}, path)
    with pytest.raises(DataError, match="found mode 'soft'; expected strict or compat"):
        evaluation.score("mine", {0: "A", 1: "A"}, path, "soft")


def test_unknown_rows_are_not_found():
    rows = Rows({1: "x", "a": "y"})
    assert rows["1"] == "x" and rows["a"] == "y"
    for index in (2, "2", "b"):
        with pytest.raises(KeyError):
            rows[index]
