"""Submission files, the page, comparison of two runs, recorded answers, intervals, full disks."""

import csv
import errno
import json
import re

import numpy as np
import openpyxl
import pytest
from evaluation_helpers import FakeEngine, choice_rows, image_cell, write_table

import evaluation
from evaluation import outputs
from evaluation.compare import compare_reports, mcnemar
from evaluation.journal import Journal
from evaluation.recorded import RecordedAnswers
from evaluation.runner import run
from evaluation.statistics import bootstrap, interval
from evaluation.tsv import read_table
from mindspeed_mm.cli.main import main
from mindspeed_mm.errors import DataError

ANSWERS = {0: "A", 1: "B", 2: "dog", 3: "None", 4: "=1+1", 5: "B"}


def evaluate(table, out, answers=ANSWERS, name="toy", model="m", **options):
    return run(name, table, FakeEngine(answers), out, model=model, progress=False, **options)


def open_rows(count, **columns):
    rows = [{"index": str(i), "image": image_cell(), "question": f"Q{i}?"} for i in range(count)]
    return [row | {name: values[i] for name, values in columns.items()} for i, row in enumerate(rows)]


def test_mmbench_submission(tmp_path):
    row = choice_rows(1)[0] | {"hint": "h", "l2-category": "c", "source": "s", "comment": "=1"}
    del row["answer"]
    result = evaluate(write_table(tmp_path / "t.tsv", [row]), tmp_path / "out", {0: "007"}, "MMBench_TEST_EN")
    assert result.files["submission"].name == "mmbench_result.xlsx" and not result.reports
    lines = list(openpyxl.load_workbook(result.files["submission"]).active.iter_rows(values_only=True))
    assert lines == [
        ("index", "question", "A", "B", "C", "prediction"),
        (0, "Question 0?", "cat", "dog", "None", "007"),
    ]


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [
        ("vqav2_testdev", {"question_id": ["77"]}, {"question_id": 77, "answer": "2 dogs"}),
        ("vizwiz", {"image_path": ["x/VizWiz_1.jpg"]}, {"image": "VizWiz_1.jpg", "answer": "2 dogs"}),
        ("docvqa_test", {"questionId": ["5"]}, {"questionId": 5, "answer": "Two Dogs."}),
        ("gqa", {}, {"questionId": "0", "prediction": "two dogs"}),
    ],
)
def test_json_submissions(tmp_path, name, columns, expected):
    path = write_table(tmp_path / "t.tsv", open_rows(1, **columns))
    result = evaluate(path, tmp_path / "out", {0: "Two Dogs."}, name)
    assert json.loads(result.files["submission"].read_text()) == [expected]


def test_letter_s_the_page_stands_alone_and_escapes(tmp_path):
    rows = choice_rows(3)
    rows[1]["question"] = "<script>alert(1)</script>"
    result = evaluate(write_table(tmp_path / "t.tsv", rows), tmp_path / "out")
    page = result.files["page"].read_text()
    assert page.count("data:image/jpeg;base64,") == 3
    assert "&lt;script&gt;alert(1)" in page and "<script>alert" not in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page) and "http" not in page.replace("http-equiv", "")
    assert 'data-category="y"' in page and "wrong only" in page and 'style="width: ' in page
    assert page.index('class="wrong"') < page.index('class="right"')


def test_a_page_of_many_rows_shows_the_wrong_ones(table_path, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.page.MAX_ROWS", 2)
    page = evaluate(table_path, tmp_path).files["page"].read_text()
    assert "2 of 6 rows, wrong ones first" in page and page.count("<tr class=") == 2


def test_one_csv_dialect_and_one_scale(table_path, tmp_path):
    open_table = write_table(tmp_path / "o.tsv", open_rows(2, answer=["a", "b"]))
    for result in (
        evaluate(table_path, tmp_path / "a"),
        evaluate(open_table, tmp_path / "b", {0: "a", 1: "c"}, "chartqa"),
    ):
        (line,) = csv.DictReader(result.files["accuracy"].read_text().splitlines())
        assert 0 <= float(line["Overall"]) <= 1


def test_two_runs_side_by_side(table_path, tmp_path, capsys):
    first = evaluate(table_path, tmp_path, model="a").files["report"]
    better = ANSWERS | {2: "cat", 3: "B"}
    second = evaluate(table_path, tmp_path, better, model="b").files["report"]
    found = compare_reports(first, second)
    assert (found.units, found.first, found.second) == (6, 3 / 6, 5 / 6)
    low, high = found.interval
    assert 0 <= low <= found.difference <= high <= 1
    assert found.p_mcnemar == 0.5 and 0 < found.p_bootstrap <= 1
    assert [row["index"] for row in found.flipped] == [2, 3]
    assert found.flipped[0]["second"] == ["A", 1]
    assert main(["evaluate", "--compare", str(first), str(second), "--json"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    assert "B - A: +0.3333" in "\n".join(text) and "2 rows flipped" in "\n".join(text)
    assert json.loads(last)["p_mcnemar"] == 0.5
    same = compare_reports(first, first, "compat")
    assert (same.difference, same.flipped, same.p_bootstrap, same.p_mcnemar) == (0, [], 1.0, 1.0)


def test_letter_l_a_run_with_a_limit_leaves_the_results_on_more_questions(table_path, tmp_path, caplog, capsys):
    whole = evaluate(table_path, tmp_path).files["report"]
    content = whole.read_bytes()
    first = evaluate(table_path, tmp_path, limit=2)
    assert (first.model, first.resumed) == ("m-first2", 2) and whole.read_bytes() == content
    assert "results on 6 questions, this run asks 2; nothing is overwritten" in caplog.text
    assert evaluate(table_path, tmp_path, limit=2).model == "m-first2"
    assert evaluate(table_path, tmp_path).model == "m" and whole.read_bytes() == content
    other = evaluate(table_path, tmp_path, limit=2, model="n", prompt_style="vlmevalkit")
    assert evaluate(table_path, tmp_path, model="n", prompt_style="vlmevalkit").model == other.model == "n"
    assert main(["evaluate", "--compare", str(first.files["report"]), str(other.files["report"])]) == 0
    assert "not only the models differ, but also: prompts, number of questions\n" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"scores": {"strict": None}}, {"scores": []}, {"rows": None}, {"rows": [1]}])
def test_letter_l_a_damaged_report_is_named(table_path, tmp_path, changes):
    path = evaluate(table_path, tmp_path).files["report"]
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(DataError, match="m_toy_report.json has damaged scores or rows; evaluate again"):
        compare_reports(path, path)


def test_mean_f1_and_points_are_compared_without_mcnemar(tmp_path):
    rows = open_rows(4, answer=["Yes", "No", "Yes", "No"], category=["random"] * 4)
    path = write_table(tmp_path / "t.tsv", rows)
    reports = [
        evaluate(path, tmp_path, dict(zip(range(4), given, strict=True)), "pope", model).files["report"]
        for model, given in (("a", ["yes", "no", "no", "no"]), ("b", ["yes", "no", "yes", "no"]))
    ]
    found = compare_reports(*reports)
    assert (found.first, found.second, found.p_mcnemar) == (pytest.approx(2 / 3), 1.0, None)


@pytest.mark.parametrize(("lost", "won", "p"), [(0, 0, 1.0), (0, 5, 0.0625), (3, 3, 1.0), (1, 9, 0.021484375)])
def test_mcnemar(lost, won, p):
    assert mcnemar(lost, won) == pytest.approx(p)
    assert mcnemar(won, lost) == mcnemar(lost, won)


def test_mcnemar_of_large_counts():
    assert 0.02 < mcnemar(1000, 1100) < 0.04


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: "{", "is not JSON"),
        (lambda report: "[]", "is no report of an evaluation"),
        (lambda report: json.dumps(report | {"benchmark": "x"}), "cannot be compared: benchmark is toy in"),
        (lambda report: json.dumps(report | {"scores": {}}), "has no strict scores; found none"),
        (
            lambda report: json.dumps(report | {"scores": {"strict": report["scores"]["strict"] | {"units": {}}}}),
            "have no questions in common",
        ),
    ],
)
def test_reports_that_cannot_be_compared(table_path, tmp_path, change, message):
    first = evaluate(table_path, tmp_path).files["report"]
    other = tmp_path / "other.json"
    other.write_text(change(json.loads(first.read_text())))
    with pytest.raises(DataError, match=message):
        compare_reports(first, other)


def test_reports_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="cannot read .*no.json"):
        compare_reports(tmp_path / "no.json", tmp_path / "no.json")
    monkeypatch.setattr("evaluation.compare.MAX_REPORT_BYTES", 0)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(DataError, match="larger than 0 bytes"):
        compare_reports(tmp_path / "a.json", tmp_path / "a.json")


@pytest.mark.parametrize("name", ["AI2D_TEST", "MMBench_DEV_EN", "ChartQA_TEST", "POPE"])
def test_prediction_files_of_the_kit_are_scored(golden_eval, tmp_path, name, capsys):
    folder = golden_eval / "benchmarks" / name
    flags = ["--predictions", str(folder / f"llava_v1.5_7b_{name}.xlsx"), "--scoring", "compat", "--json"]
    flags += ["--dataset-path", str(folder / f"{name}.tsv"), "--evaluation-dataset", name.lower()]
    assert main(["evaluate", *flags, "--result-output-path", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    expected = evaluation.score(name, folder / "predictions.json", folder / f"{name}.tsv", "compat")
    assert result["accuracy"] == pytest.approx(expected.overall)
    ours = tmp_path / f"llava_v1.5_7b_{name.lower()}.xlsx"
    again = evaluation.score(name, ours, folder / f"{name}.tsv", "compat")  # our sheets keep what theirs lose
    assert again.rows == expected.rows
    kit, header = ([c.value for c in openpyxl.load_workbook(p).active[1]] for p in (flags[1], ours))
    assert set(kit) <= set(header)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda a: {**a, 9: "A"}, "belong to no row"), (lambda a: {0: "A"}, "5 of 6 rows of toy.tsv have no answer")],
)
def test_prediction_files_that_do_not_fit(table_path, tmp_path, change, message):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(change(ANSWERS)))
    with pytest.raises(DataError, match=message):
        RecordedAnswers(path, read_table(table_path))


def test_intervals_are_of_the_expected_width():
    units = [(float(i % 4 == 0), 1.0) for i in range(400)]
    low, high = interval(units, "mean")
    half = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert low == pytest.approx(0.25 - half, abs=0.01) and high == pytest.approx(0.25 + half, abs=0.01)
    assert (bootstrap(units, "mean") == bootstrap(units, "mean")).all()


class FullDisk:
    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_the_journal(tmp_path):
    journal = Journal(tmp_path, {"x": 1}, 0)
    journal.append(1, "A")
    good, journal._file = journal._file, FullDisk()
    good.close()
    with pytest.raises(DataError, match="No space left on device. The answers before are kept"):
        journal.append(2, "B")
    journal.close()
    assert Journal(tmp_path, {"x": 1}, 0).read() == {1: "A"}


def test_a_full_disk_leaves_no_half_of_a_file(table_path, tmp_path, monkeypatch):
    def full(path, columns, rows):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(outputs, "write_sheet", full)
    with pytest.raises(DataError, match="cannot write .*m_toy.xlsx: No space left"):
        evaluate(table_path, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["m_toy.journal"]


def test_letter_s_texts_that_are_cut_say_so_and_no_option_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.page.SHOWN", 12)
    rows = [row | {"J": "owl"} for row in choice_rows(2)]
    table = write_table(tmp_path / "t.tsv", rows)
    page = evaluate(table, tmp_path / "out", {0: "I do not know it", 1: "B"}).files["page"].read_text()
    assert "I do not kno [...]" in page and "J. owl" in page and "(nothing)" in page


def test_letter_s_prompts_of_recorded_answers_are_not_known(tmp_path):
    from evaluation.wording import prompts_text

    assert prompts_text({"prompt_style": "official"}) == "official"
    assert prompts_text({"prompt_style": "official", "predictions": "a.json"}) is None
