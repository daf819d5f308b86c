"""Questions without an image, which LLaVA asks of ScienceQA and VLMEvalKit drops."""

import json

import pytest
from evaluation_helpers import FakeEngine, choice_rows, write_table

import mindspeed_mm as mm
from evaluation.benchmarks import find_benchmark
from evaluation.questions import read_questions
from evaluation.runner import run
from evaluation.tsv import read_table
from mindspeed_mm.cli.main import main
from mindspeed_mm.errors import DataError

ANSWERS = {0: "A", 1: "A", 2: "A", 3: "B", 4: "A", 5: "B"}


@pytest.fixture
def mixed_path(tmp_path):
    """Six questions, right answers A, B, A, B, ...; the last two have no image."""
    rows = choice_rows()
    rows[4]["image"], rows[5]["image"] = "", "NA"
    return write_table(tmp_path / "mixed.tsv", rows)


def test_they_are_dropped_unless_asked_for(mixed_path):
    assert read_table(mixed_path).dropped == (4, 5)
    table = read_table(mixed_path, text_questions=True)
    assert table.dropped == () and [row.image_count for row in table.rows] == [1, 1, 1, 1, 0, 0]
    assert table.images(table.rows[5]) == () and len(table.images(table.rows[1])) == 1


def test_scores_with_and_without_an_image_are_told(mixed_path, tmp_path):
    engine = FakeEngine(ANSWERS)
    result = run("toy", mixed_path, engine, tmp_path, model="m", progress=False, text_questions=True)
    report = result.reports["strict"]
    assert report.n == 6 and report.overall == pytest.approx(5 / 6) and report.dropped == 0
    assert report.notes == {"accuracy_with_image": 0.75, "accuracy_text_only": 1.0}
    asked = {request.id: request.turns[0][0] for request in engine.asked}
    assert asked[4].startswith("Question 4") and asked[3].startswith("<image>\nQuestion 3")
    saved = json.loads(result.files["report"].read_text())
    assert saved["scores"]["compat"]["notes"]["accuracy_text_only"] == 1.0
    without = run("toy", mixed_path, FakeEngine(ANSWERS), tmp_path, model="m", progress=False)
    assert without.resumed == 0 and without.reports["strict"].notes == {}, "other prompts, another journal"


def test_a_table_of_text_only(tmp_path):
    rows = [row | {"image": ""} for row in choice_rows()]
    path = write_table(tmp_path / "t.tsv", rows)
    with pytest.raises(DataError, match="none of the 6 rows has an image; fill column image, or ask for text"):
        read_table(path)
    assert mm.score("toy", ANSWERS, path, text_questions=True).notes == {}


def test_golden_prompts_and_accuracy_of_all_science_questions(golden_eval):
    folder = golden_eval / "benchmarks" / "ScienceQA_TEST"
    expected = json.loads((folder / "expected.json").read_text())
    prompts = json.loads((golden_eval / "prompts.json").read_text())["ScienceQA_TEST"]
    table = read_questions(folder / "ScienceQA_TEST.tsv", text_questions=True)
    own = find_benchmark("scienceqa_test", table).prompts(table, "official")
    assert len(own) == expected["rows_in_tsv"] == len(prompts)
    for index, prompt in own.items():
        text = prompt.turns[0][0]
        assert f" USER: {text} ASSISTANT:" in prompts[str(index)]["llava_official"]["prompt"]
    answers = {row["index"]: row["prediction"] for row in json.loads((folder / "predictions.json").read_text())}
    report = mm.score("scienceqa_test", answers, folder / "ScienceQA_TEST.tsv", text_questions=True)
    public = expected["llava_eval_science_qa"]
    assert report.n == public["count"] and 0 < report.notes["accuracy_text_only"] <= 1


def test_the_command_tells_which_rows_it_leaves_out(golden, mixed_path, tmp_path, capsys):
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps([{"index": index, "prediction": text} for index, text in ANSWERS.items()]))
    line = ["evaluate", "--predictions", str(answers), "--dataset-path", str(mixed_path)]
    line += ["--evaluation-dataset", "toy", "--result-output-path", str(tmp_path / "o")]
    assert main(line) == 0
    assert "no image: 2 rows, for example index 4 (--text-questions asks" in capsys.readouterr().err
    assert main([*line, "--text-questions"]) == 0
    assert "no image" not in capsys.readouterr().err


def test_the_command_asks_them(golden, mixed_path, tmp_path, capsys):
    line = [
        *("evaluate", "--model", str(golden / "models" / "llava_hf"), "--dataset-path", str(mixed_path), "--json"),
        *("--evaluation-dataset", "scienceqa", "--result-output-path", str(tmp_path), "--max-new-tokens", "2"),
        *("--device", "cpu", "--batch-size", "4", "--text-questions"),
    ]
    assert main(line) == 0
    *text, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["n"] == 6 and any("accuracy text only" in row for row in text)
