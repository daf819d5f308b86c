import json
import sys

import openpyxl
import pytest
from evaluation_helpers import choice_rows, write_table

from evaluation.engine import EvaluationRequest
from evaluation.predictions import match_predictions
from evaluation.recorded import RecordedAnswers
from evaluation.sheet import write_sheet
from evaluation.tsv import read_table
from mindspeed_mm.errors import DataError

ANSWERS = {index: text for index, text in enumerate(["A", "None", "007", "=1+1", "", "B\n"])}
RECORDS = [{"index": index, "prediction": text} for index, text in ANSWERS.items()]


@pytest.fixture
def table(table_path):
    return read_table(table_path)


@pytest.mark.parametrize("form", ["dict", "text keys", "list", "json", "object", "jsonl"])
def test_every_form_of_answers(table, tmp_path, form):
    path = tmp_path / f"answers.{'jsonl' if form == 'jsonl' else 'json'}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    else:
        path.write_text(json.dumps(ANSWERS if form == "object" else RECORDS))
    forms = {"dict": ANSWERS, "text keys": {str(k): v for k, v in ANSWERS.items()}, "list": reversed(RECORDS)}
    found, missing = match_predictions(forms.get(form, path), table)
    assert (found, missing) == (ANSWERS, 0)
    assert list(found) == list(ANSWERS)


def test_spreadsheet_of_another_tool(table, tmp_path):
    book = openpyxl.Workbook()
    book.active.append(["index", "question", "prediction"])
    for row in [(0, "?", "A"), (1.0, "?", 14.0), (2, "?", None), (3, "?", "x"), (4, "?", True), (5, "?", 0.5)]:
        book.active.append(row)
    book.save(tmp_path / "answers.xlsx")
    found, _ = match_predictions(tmp_path / "answers.xlsx", table)
    assert list(found.values()) == ["A", "14", "", "x", "True", "0.5"]


def test_spreadsheet_rows_that_end_early(tmp_path):
    table = read_table(write_table(tmp_path / "t.tsv", choice_rows(2)))
    write_sheet(tmp_path / "a.xlsx", ["index", "prediction"], [(0,), (1, "A"), (None, None)])
    assert match_predictions(tmp_path / "a.xlsx", table)[0] == {0: "", 1: "A"}


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b"])
def test_other_line_ends_stand_in_an_answer(tmp_path, separator):
    table = read_table(write_table(tmp_path / "t.tsv", choice_rows(1)))
    text = json.dumps({"index": 0, "prediction": f"A{separator}B"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(text + "\r\n", encoding="utf-8", newline="")
    assert match_predictions(tmp_path / "a.jsonl", table)[0] == {0: f"A{separator}B"}


def test_missing_answers_may_be_allowed(table):
    found, missing = match_predictions({2: "A"}, table, allow_missing=True)
    assert (found, missing) == ({2: "A"}, 5)


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ({**ANSWERS, 9: "A"}, "1 answers belong to no row of toy.tsv, for example index 9"),
        ({0: "A"}, "5 of 6 rows of toy.tsv have no answer, for example index 1"),
        ({**ANSWERS, 0: 14}, "the answer of index 0 is 14; expected a text"),
        ([*RECORDS, RECORDS[0]], "index 0 is answered twice"),
        ([{"index": 0}], "record 0.*: found .*expected an object with index and prediction"),
        (["A"], "record 0: found 'A'"),
    ],
)
def test_answers_that_do_not_fit(table, predictions, message):
    with pytest.raises(DataError, match=message):
        match_predictions(predictions, table)


@pytest.mark.parametrize(
    ("answered", "limit", "message"),
    [
        ([0, 1], None, "4 of 6 rows of toy.tsv .* index 2; add their answers .* 2 questions before it .* --limit 2"),
        ([1], 3, r"2 of 3 rows of toy.tsv .* index 0; add their answers \(.*: it counts as wrong\)\.$"),
    ],
)
def test_letter_f_the_command_names_what_it_can_do_without_some_answers(table, tmp_path, answered, limit, message):
    (tmp_path / "a.json").write_text(json.dumps({index: "A" for index in answered}))
    with pytest.raises(DataError, match=message):
        RecordedAnswers(tmp_path / "a.json", table, limit=limit)


def test_a_limit_asks_for_no_answers_behind_it(table, tmp_path):
    (tmp_path / "a.json").write_text('{"0": "A", "1": "B"}')
    requests = [EvaluationRequest(row.index, None, "?", "", tuple) for row in table.rows[:2]]
    assert dict(RecordedAnswers(tmp_path / "a.json", table, limit=2).generate(requests, 1)) == {0: "A", 1: "B"}


def test_no_answers_at_all(table):
    with pytest.raises(DataError, match="no row of toy.tsv is answered"):
        match_predictions({}, table, allow_missing=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "is not JSON"),
        ("a.jsonl", b'{"index": 1}\n{', "is not JSON"),
        ("a.json", b'{"0": "A", "0": "B"}', 'key "0" is given twice'),
        ("a.jsonl", b'{"index": 0, "prediction": "A", "prediction": "B"}\n', 'line 1: key "prediction" is given twice'),
        ("a.json", b"\xff", "is not UTF-8 text"),
        ("a.csv", b"1,2", "the form of the answers is not known"),
        ("a.xlsx", b"no zip", "is not a spreadsheet"),
    ],
)
def test_unusable_files(table, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        match_predictions(tmp_path / name, table)


def test_missing_file_and_columns(table, tmp_path):
    with pytest.raises(DataError, match="cannot read .*no.json"):
        match_predictions(tmp_path / "no.json", table)
    book = openpyxl.Workbook()
    book.active.append(["index", "answer"])
    book.save(tmp_path / "a.xlsx")
    with pytest.raises(DataError, match="found columns .*expected index and prediction"):
        match_predictions(tmp_path / "a.xlsx", table)


def test_too_large_a_file(table, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.predictions.MAX_FILE_BYTES", 3)
    (tmp_path / "a.json").write_text("[   ]")
    with pytest.raises(DataError, match="larger than 3 bytes"):
        match_predictions(tmp_path / "a.json", table)


def test_without_openpyxl(table, tmp_path, monkeypatch):
    (tmp_path / "a.xlsx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(DataError, match="reading a spreadsheet needs openpyxl"):
        match_predictions(tmp_path / "a.xlsx", table)
