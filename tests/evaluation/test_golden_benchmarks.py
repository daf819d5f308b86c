"""Every benchmark of the goldens, row by row and table by table, in both modes; every prompt byte by byte."""

import csv
import json
import math

import pytest

import evaluation
import mindspeed_mm as mm
from evaluation.benchmarks import find_benchmark
from evaluation.benchmarks.mcq._choice import options_of
from evaluation.kit_view import answers_of_kit, views_of_kit
from evaluation.questions import read_questions
from evaluation.scorers import choice_compat, circular, relaxed, vqa
from evaluation.scorers.cells import strict_answers
from mindspeed_mm.data.rendering import generation_prompt

CHOICE = ("AI2D_TEST", "CCBench", "ScienceQA_TEST", "MMMU_DEV_VAL", "MMBench_DEV_EN", "MMBench_DEV_CN")
OPEN = ("ChartQA_TEST", "DocVQA_VAL", "TextVQA_VAL")
ALL = (*CHOICE, *OPEN, "POPE")
ANSWER_FILES = ("predictions.json", "llava_v1.5_7b_{}.xlsx")


def folder_of(golden_eval, name):
    folder = golden_eval / "benchmarks" / name
    return folder, json.loads((folder / "expected.json").read_text())


def same_tables(found, expected):
    assert set(found) == set(expected)
    for line, columns in expected.items():
        assert set(found[line]) == set(columns)
        for column, value in columns.items():
            value = math.nan if value == "nan" else value
            assert found[line][column] == pytest.approx(value, abs=1e-9, nan_ok=True), (line, column)


def same_rows(report, rows):
    assert len(report.rows) == len(rows)
    for row in rows:
        found = report.rows[row["index"]]
        for key in {"extracted", "hit", "score"} & set(row):
            assert found[key] == (pytest.approx(float(row[key]), abs=1e-9) if key == "score" else row[key]), row


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("answers", ANSWER_FILES)
def test_compat_equals_the_kit(golden_eval, name, answers):
    folder, expected = folder_of(golden_eval, name)
    report = evaluation.score(name.lower(), folder / answers.format(name), folder / f"{name}.tsv", "compat")
    same_tables(report.table, expected["table"])
    same_rows(report, expected["rows"])
    assert report.dropped == len(expected["dropped_indices"])


@pytest.mark.parametrize("name", ALL)
def test_strict_equals_the_definition(golden_eval, name):
    folder, expected = folder_of(golden_eval, name)
    report = mm.score(name, json.loads((folder / "predictions.json").read_text()), folder / f"{name}.tsv")
    same_tables(report.table, expected["table_strict"])
    same_rows(report, [{"index": row["index"], **row["strict"]} for row in expected["rows"]])


@pytest.mark.parametrize("name", ALL)
def test_csv_equals_the_kits_in_fractions(golden_eval, name):
    folder, _ = folder_of(golden_eval, name)
    report = evaluation.score(name, folder / "predictions.json", folder / f"{name}.tsv", "compat")
    (path,) = [path for path in folder.iterdir() if path.suffix == ".csv"]
    kit, ours = (list(csv.DictReader(lines.splitlines())) for lines in (path.read_text(), report.to_csv()))
    kit = {line.get("split", "all"): line for line in kit}
    ours = {line["split"]: line for line in ours}
    assert set(kit) == set(ours)
    for split, line in kit.items():
        for column in set(line) - {"split"}:
            values = [float(cell) if cell else math.nan for cell in (line[column], ours[split][column])]
            assert values[0] / report.scale == pytest.approx(values[1], nan_ok=True)


@pytest.mark.parametrize("name", ["MMBench_DEV_EN", "MMBench_DEV_CN"])
@pytest.mark.parametrize(("mode", "key"), [("compat", "hit"), ("strict", "strict_hit")])
def test_questions_of_mmbench_count_once(golden_eval, name, mode, key):
    folder, expected = folder_of(golden_eval, name)
    report = evaluation.score(name, folder / "predictions.json", folder / f"{name}.tsv", mode)
    assert {int(unit): numbers[0] for unit, numbers in report.units.items()} == {
        group["g_index"]: group[key] for group in expected["groups"]
    }
    assert report.overall == pytest.approx(report.table["dev"]["Overall"])


@pytest.mark.parametrize("name", ALL)
def test_prompts_of_the_kit(golden_eval, name):
    expected = json.loads((golden_eval / "prompts.json").read_text())[name]
    table = read_questions(golden_eval / "benchmarks" / name / f"{name}.tsv")
    prompts = find_benchmark(name, table).prompts(table, "vlmevalkit")
    kept = {int(index): entry for index, entry in expected.items() if "vlmevalkit_llava" in entry}
    assert set(kept) == set(prompts)
    for index, entry in kept.items():
        assert prompts[index].text == entry["vlmevalkit_llava"]["prompt"]


@pytest.mark.parametrize("name", ALL)
def test_prompts_of_llava(golden_eval, name):
    expected = json.loads((golden_eval / "prompts.json").read_text())[name]
    table = read_questions(golden_eval / "benchmarks" / name / f"{name}.tsv")
    prompts = find_benchmark(name, table).prompts(table, "official")
    for index, prompt in prompts.items():
        official = expected[str(index)]["llava_official"]
        if official is None:  # LLaVA has no script for this benchmark
            continue
        assert generation_prompt(prompt.turns, "v1") == official["prompt"], index


@pytest.mark.parametrize(("mode", "key"), [("compat", "llava_eval_pope"), ("strict", "strict")])
@pytest.mark.parametrize("answers", ["answers.jsonl", "answers_shuffled.jsonl"])
def test_original_pope_by_question_id(golden_eval, mode, key, answers):
    folder, expected = folder_of(golden_eval, "pope_original")
    report = evaluation.score("pope", folder / answers, folder / "llava_pope_test.jsonl", mode)
    for name, rates in expected[key].items():
        for rate in set(rates) - {"samples", "printed_line"}:
            assert report.table[name][rate] == pytest.approx(rates[rate], abs=1e-9)
    for row in expected["rows"]:
        assert report.rows[row["question_id"]].extracted == row["llava" if mode == "compat" else "strict"]
    assert report.overall == pytest.approx(report.table["mean_of_three"]["f1"])


@pytest.mark.parametrize("name", ["random", "popular", "adversarial"])
def test_one_original_set_with_answers_of_the_official_form(golden_eval, name):
    folder, expected = folder_of(golden_eval, "pope_original")
    answers = folder / f"pope_{name.replace('adversarial', 'adv')}.jsonl"
    report = evaluation.score("POPE", answers, folder / "coco" / f"coco_pope_{name}.json", "compat")
    for rate, value in expected["pope_official_evaluate"][name].items():
        assert report.table[name][rate] == pytest.approx(value)


def test_three_original_sets_of_a_folder(golden_eval):
    folder, expected = folder_of(golden_eval, "pope_original")
    answers = {}
    for name, short in (("random", "random"), ("popular", "popular"), ("adversarial", "adv")):
        for line in (folder / f"pope_{short}.jsonl").read_text().splitlines():
            record = json.loads(line)
            answers[f"{name}/{record['question_id']}"] = record["answer"]
    report = evaluation.score("pope", answers, folder / "coco")
    assert report.table["mean_of_three"]["f1"] == pytest.approx(expected["strict"]["mean_of_three"]["f1"])


@pytest.mark.parametrize("brackets", ["square", "round"])
@pytest.mark.parametrize(("mode", "key"), [("compat", "metrics"), ("strict", "strict")])
def test_referring_expressions(golden_eval, brackets, mode, key):
    folder, expected = folder_of(golden_eval, "rec_shikra")
    questions = folder / "REC_golden_test.jsonl"
    report = evaluation.score("rec", folder / f"predictions_{brackets}.jsonl", questions, mode)
    for name, value in expected[key][brackets].items():
        assert report.table["all"][name] == pytest.approx(value, abs=1e-6)
    table = read_questions(questions)
    benchmark = find_benchmark("REC", table)
    prompts = benchmark.prompts(table, "official")
    for row, golden in zip(table.rows, expected["rows"], strict=True):
        assert prompts[row.index].turns == ((golden["question"], None),)
        assert benchmark.target(row, table) == golden["box_normalised"]
        assert report.rows[row.index].hit == int(golden["correct"])


def test_headline_numbers_are_those_of_the_tables(golden_eval):
    for name in ALL:
        folder, expected = folder_of(golden_eval, name)
        for mode, key in (("compat", "table"), ("strict", "table_strict")):
            report = evaluation.score(name, folder / "predictions.json", folder / f"{name}.tsv", mode)
            if name == "POPE":
                value = (
                    expected[key]["Overall"]["Overall"] if mode == "compat" else expected[key]["mean_of_three"]["f1"]
                )
            elif len(expected[key]) == 1:
                value = next(iter(expected[key].values()))["Overall"]
            else:  # MMMU has two splits; the headline is over both
                value = sum(row.hit for row in report.rows.values()) / report.n
            assert report.overall == pytest.approx(value / report.scale)
            low, high = report.interval
            assert low <= report.overall <= high


def answered(golden_eval, name):
    folder, expected = folder_of(golden_eval, name)
    answers = {r["index"]: r["prediction"] for r in json.loads((folder / "predictions.json").read_text())}
    return read_questions(folder / f"{name}.tsv"), answers, expected


def test_rules_of_other_evaluators_on_whole_tables(golden_eval):
    table, answers, expected = answered(golden_eval, "TextVQA_VAL")
    scores = {
        str(row.index): vqa.m4c_score(strict_answers(row.cells["answer"]), answers[row.index]) for row in table.rows
    }
    assert scores == pytest.approx(expected["llava_m4c"]["rows"])
    table, answers, expected = answered(golden_eval, "ChartQA_TEST")
    scores = {
        str(row.index): max(relaxed.mindspeed_matches(row.cells["answer"], answers[row.index])) for row in table.rows
    }
    assert scores == expected["mindspeed"]["rows"]
    table, answers, expected = answered(golden_eval, "AI2D_TEST")
    views = views_of_kit(table, table.rows)
    given = answers_of_kit([answers[row.index] for row in table.rows])
    letters = [
        choice_compat.mindspeed_read_choice(answer, options_of(views[row.index]))
        for row, answer in zip(table.rows, given, strict=True)
    ]
    hits = {str(r.index): int(letter == r.cells["answer"]) for r, letter in zip(table.rows, letters, strict=True)}
    assert hits == expected["mindspeed"]["rows"]
    for name in ("MMBench_DEV_EN", "MMBench_DEV_CN", "CCBench"):
        table, answers, expected = answered(golden_eval, name)
        meta = [{**row.cells, "index": row.index} for row in table.rows]
        rows = [{**row, "prediction": answers[row["index"]]} for row in meta]
        assert circular.xtuner_table(meta, rows) == pytest.approx(expected["xtuner_mmbench"])
