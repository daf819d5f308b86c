import base64
import json
import os

import openpyxl
import pytest
from evaluation_helpers import FakeEngine, choice_rows, image_cell, on_ranks, write_table

from evaluation.recorded import RecordedAnswers
from evaluation.runner import run
from evaluation.tsv import read_table
from mindspeed_mm.errors import DataError

ANSWERS = {0: "A", 1: "B", 2: "dog", 3: "None", 4: "=1+1", 5: "y" * 40_000}


def evaluate(table, out, engine=None, **options):
    engine = engine or FakeEngine(ANSWERS)
    return run("toy", table, engine, out, model="m", progress=False, **options)


def outputs(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_files_hold_the_table_the_answers_and_the_scores(table_path, tmp_path):
    result = evaluate(table_path, tmp_path / "out")
    assert set(outputs(tmp_path / "out")) == {"m_toy.xlsx", "m_toy_acc.csv", "m_toy_report.json", "m_toy_report.html"}
    header, *rows = openpyxl.load_workbook(result.files["predictions"]).active.iter_rows(values_only=True)
    assert header == (
        *("index", "question", "A", "B", "C", "answer", "category"),
        *("prediction", "extracted", "hit", "log"),
    )
    assert rows[0][:2] == (0, "Question 0?") and rows[0][4] == "None"
    assert [row[7] for row in rows[:5]] == ["A", "B", "dog", "None", "=1+1"]
    assert [row[9] for row in rows] == [1, 1, 0, 0, 0, 0]
    assert rows[5][7].endswith("the whole text is in the journal]") and "is cut in this sheet" in rows[5][10]
    assert result.files["accuracy"].read_text() == result.reports["strict"].to_csv()


def test_the_report_says_what_the_numbers_depend_on(table_path, tmp_path):
    result = evaluate(table_path, tmp_path / "out", scoring="compat", prompt_style="vlmevalkit")
    report = json.loads(result.files["report"].read_text())
    assert (report["model"], report["prompt_style"], report["scoring"]) == ("m", "vlmevalkit", "compat")
    assert (report["template"], report["decoding"]) == ("v1", {"max_new_tokens": 4})
    assert report["accuracy"] == report["scores"]["compat"]["overall"] == 2 / 6
    assert report["unparsed"] == 3 and report["cells_cut_in_sheet"] == 1
    assert set(report["scores"]) == {"strict", "compat"}


def test_requests_carry_prompt_and_images(table_path, tmp_path):
    engine = FakeEngine(ANSWERS)
    evaluate(table_path, tmp_path / "a", engine)
    evaluate(table_path, tmp_path / "b", engine, prompt_style="vlmevalkit", limit=1)
    official, kit = engine.asked[-2], engine.asked[-1]
    assert official.text is None and official.turns[0][0].startswith("<image>\nQuestion")
    assert kit.turns is None and kit.text.endswith(" ASSISTANT: ")
    assert official.images()[0].size == (4, 3)
    assert len({request.image for request in engine.asked}) == 1, "all rows show the same image"
    assert [request.id for request in engine.asked[:6]] == [0, 1, 2, 3, 4, 5], "long ones first; this engine turns them"


def test_ranks_of_one_copy_ask_the_same_and_one_of_them_writes(table_path, tmp_path):
    engines = [FakeEngine(ANSWERS) for _ in range(4)]

    def on_rank(communicator):
        communicator.replica, communicator.replicas = communicator.rank // 2, 2
        communicator.is_leader = communicator.rank % 2 == 0
        return evaluate(table_path, tmp_path / "o", engines[communicator.rank], communicator=communicator)

    results = on_ranks(4, on_rank)
    asked = [sorted(request.id for request in engine.asked) for engine in engines]
    assert asked[0] == asked[1] and asked[2] == asked[3] and sorted(asked[0] + asked[2]) == sorted(ANSWERS)
    assert len(list((tmp_path / "o" / "m_toy.journal").iterdir())) == 2
    evaluate(table_path, tmp_path / "alone")
    assert outputs(tmp_path / "o") == outputs(tmp_path / "alone")
    assert all(result.predictions == ANSWERS for result in results)


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 16), (2, 1), (3, 4), (7, 2)])
def test_files_are_equal_at_any_number_of_ranks_and_batch_size(table_path, tmp_path, ranks, batch_size):
    alone = evaluate(table_path, tmp_path / "alone")
    results = on_ranks(
        ranks,
        lambda communicator: evaluate(table_path, tmp_path / "many", communicator=communicator, batch_size=batch_size),
    )
    assert outputs(tmp_path / "many") == outputs(tmp_path / "alone")
    assert all(result.reports == alone.reports and result.predictions == ANSWERS for result in results)
    assert [bool(result.files) for result in results] == [True] + [False] * (ranks - 1)


def test_a_run_killed_twice_goes_on_and_ends_equal(table_path, tmp_path):
    evaluate(table_path, tmp_path / "whole")
    asked = []
    for _ in range(2):
        engine = FakeEngine(ANSWERS, fails_after=2)
        with pytest.raises(KeyboardInterrupt):
            evaluate(table_path, tmp_path / "killed", engine)
        asked += [request.id for request in engine.asked]
    assert not outputs(tmp_path / "killed")
    (journal,) = (tmp_path / "killed" / "m_toy.journal").iterdir()
    journal.write_bytes(journal.read_bytes()[:-3])
    engine = FakeEngine(ANSWERS)
    result = on_ranks(
        2, lambda communicator: evaluate(table_path, tmp_path / "killed", engine, communicator=communicator)
    )
    assert result[0].resumed == 3
    assert sorted(asked + [request.id for request in engine.asked]) == sorted([*ANSWERS, asked[-1]])
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "whole")


def test_letter_l_answers_of_another_model_style_or_table_are_not_used(table_path, tmp_path):
    evaluate(table_path, tmp_path)
    assert evaluate(table_path, tmp_path).resumed == 6
    assert evaluate(table_path, tmp_path, FakeEngine(ANSWERS, name="other")).resumed == 0
    assert evaluate(table_path, tmp_path, prompt_style="vlmevalkit").resumed == 0
    table_path.write_bytes(table_path.read_bytes().replace(b"Question 0", b"Question O"))
    assert evaluate(table_path, tmp_path).resumed == 0


def test_answers_to_other_images_of_the_same_name_are_not_used(tmp_path):
    (tmp_path / "a.png").write_bytes(base64.b64decode(image_cell()))
    path = write_table(tmp_path / "t.tsv", [{"index": "0", "image_path": "a.png", "question": "?", "answer": "A"}])
    assert evaluate(path, tmp_path).resumed == 0
    assert evaluate(path, tmp_path).resumed == 1
    (tmp_path / "a.png").write_bytes(base64.b64decode(image_cell(size=(90, 80))))
    assert evaluate(path, tmp_path).resumed == 0


def test_recorded_answers_to_a_damaged_image_are_scored_and_the_page_tells(tmp_path):
    damaged = base64.b64encode(b"no image" * 9).decode()
    path = write_table(tmp_path / "t.tsv", [{"index": "0", "image": damaged, "question": "?", "answer": "A"}])
    (tmp_path / "answers.json").write_text('{"0": "A"}')
    table = read_table(path)
    result = evaluate(path, tmp_path, RecordedAnswers(tmp_path / "answers.json", table))
    assert result.reports["strict"].overall == 1
    assert "row with index 0: the image cannot be decoded" in result.files["page"].read_text()


def test_a_limited_run_is_continued_by_the_whole(table_path, tmp_path):
    assert len(evaluate(table_path, tmp_path, limit=2).predictions) == 2
    result = evaluate(table_path, tmp_path)
    assert (result.resumed, result.reports["strict"].n) == (2, 6)


def test_a_table_without_answers_gives_predictions_only(tmp_path):
    rows = [{name: cell for name, cell in row.items() if name != "answer"} | {"hit": "own"} for row in choice_rows()]
    result = evaluate(write_table(tmp_path / "t.tsv", rows), tmp_path / "out")
    assert result.reports == {} and set(result.files) == {"predictions", "report", "page"}
    header, first, *_ = openpyxl.load_workbook(result.files["predictions"]).active.iter_rows(values_only=True)
    assert header[-5:] == ("hit (tsv)", "prediction", "extracted", "hit", "log")
    assert first[-5:] == ("own", "A", None, None, "not scored: the table has no answers")
    assert json.loads(result.files["report"].read_text())["accuracy"] is None


def test_progress_is_shown_on_stderr(table_path, tmp_path, capsys):
    run("toy", table_path, FakeEngine(ANSWERS), tmp_path, model="m")
    captured = capsys.readouterr()
    assert captured.out == "" and "6/6" in captured.err and "ETA" in captured.err


class WrongEngine(FakeEngine):
    def generate(self, requests, batch_size):
        yield from self.answers


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([(99, "A")], "answered id 99, which is not open"),
        ([(5, "A"), (5, "B")], "answered id 5"),
        ([], "no answer for"),
    ],
)
def test_an_engine_that_answers_wrongly_is_noticed(table_path, tmp_path, answers, message):
    with pytest.raises(ValueError, match=message):
        evaluate(table_path, tmp_path, WrongEngine(answers))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_style": "free"}, "found prompt style 'free'; expected official or vlmevalkit"),
        ({"scoring": "soft"}, "found scoring 'soft'"),
        ({"batch_size": 0}, "found batch size 0; expected 1 or more"),
        ({"limit": 0}, "found limit 0; expected 1 or more"),
    ],
)
def test_wrong_options(table_path, tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        evaluate(table_path, tmp_path, **options)


@pytest.mark.parametrize("name", ["a/b", "", "..", "a\nb"])
def test_names_that_are_no_file_names(table_path, tmp_path, name):
    with pytest.raises(DataError, match="cannot be part of a file name"):
        run("toy", table_path, FakeEngine(ANSWERS), tmp_path, model=name)


def test_a_folder_that_cannot_be_made(table_path, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot create the result folder"):
        evaluate(table_path, tmp_path / "file" / "out")


def test_a_folder_that_cannot_be_written(table_path, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(DataError, match="is not writable"):
        evaluate(table_path, tmp_path)


def test_a_broken_image_ends_the_run_and_keeps_the_journal(tmp_path):
    rows = choice_rows(2)
    rows[1]["image"] = base64.b64encode(b"no image " * 10).decode()
    path = write_table(tmp_path / "t.tsv", rows)
    with pytest.raises(DataError, match="row with index 1: the image cannot be decoded"):
        evaluate(path, tmp_path / "out")
    assert len(list((tmp_path / "out" / "m_toy.journal").iterdir())) == 1
