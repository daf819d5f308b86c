"""SHR: its files, sentences and labels, the judge over HTTP and from a file, and the command."""

import json
import re

import pytest
from evaluation_helpers import FakeEngine
from PIL import Image

import evaluation
from evaluation.judge import HttpJudge
from evaluation.questions import read_questions
from evaluation.recorded_judge import RecordedJudge
from evaluation.runner import run
from evaluation.scorers.sentences import (
    JudgedText,
    compat_labels,
    distinct_share,
    rates,
    split_sentences,
    strict_labels,
)
from mindspeed_mm.cli.main import main
from mindspeed_mm.errors import DataError

ANSWERS = {
    1: "A dog runs. A cat sleeps. It is sunny. A dog runs. A cat",
    2: "Two cars stand near a tree.",
    3: "A man rides a horse. He smiles",
}
VERDICTS = {
    1: "Judgement:\n1. correct: region 1.\n2. hallucination: no cat.\n3. cannot judge: weather.",
    2: "Judgement:\n1. Hallucination: one car: not two.",
    3: "Judgement:\n1. correct: fact.\n2. correct: fact.",
}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def shr(tmp_path):
    """SHR's folder with three images, and Visual Genome's beside it with a fourth."""
    write(tmp_path / "shr/val_images_final.json", [{"image_id": number} for number in (1, 2, 3)])
    write(tmp_path / "shr/shr_factual_part1.jsonl", lines({"1": ["A dog.", "Grass."]}, {"2": ["One car."]}))
    write(tmp_path / "shr/shr_factual_part2.jsonl", lines({"2": ["One red car."]}))
    image = {"width": 80, "height": 60}
    images = [image | {"image_id": n, "url": f"https://x/VG_100K/{n}.jpg"} for n in (4, 3, 2, 1)]
    write(tmp_path / "VG/image_data.json", images)
    region = {"x": 8, "y": 20, "width": 73, "height": 30}
    regions = [[region | {"image_id": n, "phrase": phrase} for phrase in (f"thing {n}", "")] for n in (1, 2, 3, 4)]
    write(tmp_path / "VG/region_descriptions.json", [{"id": 7, "regions": []}, *({"regions": one} for one in regions)])
    (tmp_path / "VG/VG_100K").mkdir()
    for number in (1, 2, 3):
        Image.new("RGB", (80, 60), "red").save(tmp_path / f"VG/VG_100K/{number}.jpg")
    return tmp_path / "shr"


def image_of(prompt):
    return int(re.search(r"thing (\d)", prompt)[1])


def test_the_files_are_joined(shr):
    table = read_questions(shr)
    assert [row.index for row in table.rows] == [1, 2, 3] and table.images(table.rows[0])[0].size == (80, 60)
    cells = [row.cells for row in table.rows]
    assert cells[0]["regions"] == "[0.1, 0.33, 1.01, 0.83]: thing 1"
    assert [one["facts"] for one in cells] == ["A dog.\nGrass.", "One red car.", ""]
    assert read_questions(shr, image_root=shr.parent / "VG").sha256 == table.sha256
    write(shr / "shr_factual_part2.jsonl", lines({"2": ["A bus."]}))
    assert read_questions(shr).sha256 != table.sha256


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("shr/val_images_final.json", [{"image_id": 1}, {"image_id": 1}], "names image 1 twice"),
        ("shr/val_images_final.json", [{"image": 1}], 'expected {"image_id": 2316462}'),
        ("shr/val_images_final.json", [{"image_id": 9}, {"image_id": 1}], "image_data.json does not know 1 of SHR's 2"),
        ("shr/shr_factual_part1.jsonl", '{"1": "A dog."}\n', "image 1: found 'A dog.'; expected a list of texts"),
        ("VG/image_data.json", [{"image_id": n, "url": "a/b"} for n in (1, 2, 3)], "found width None and height None"),
        (
            "VG/image_data.json",
            [{"image_id": n, "url": "b", "width": 9, "height": 9} for n in (1, 2, 3)],
            'expected a "url"',
        ),
        ("VG/region_descriptions.json", [{"regions": []}], "region_descriptions.json does not know 3 of SHR's 3"),
        ("VG/region_descriptions.json", [{"regions": [{"image_id": 1, "x": 1}]}], "expected x, y, width, height and"),
    ],
)
def test_files_of_another_form(shr, file, content, message):
    write(shr.parent / file, content)
    with pytest.raises(DataError, match=re.escape(message)):
        read_questions(shr)


def test_sentences():
    assert split_sentences(ANSWERS[1]) == ["A dog runs", "A cat sleeps", "It is sunny"]
    assert split_sentences("A cat. A cat sleeps. . \n") == ["A cat", "A cat sleeps"]
    assert split_sentences("") == []


def test_labels():
    assert (
        strict_labels(VERDICTS[1], 3) == compat_labels(VERDICTS[1], 3) == ["correct", "hallucination", "cannot judge"]
    )
    assert strict_labels(VERDICTS[1], 2) is None and compat_labels(VERDICTS[1], 2) is None
    assert strict_labels("Judgment:\n**2)** Correct - yes\n1. **Hallucination**: no", 2) == ["hallucination", "correct"]
    assert compat_labels("Judgment:\n1. correct: yes", 1) is None
    assert compat_labels("Judgement:\n1. **correct**: yes", 1) == ["**correct**"]
    assert strict_labels("1. incorrect: it is correct", 1) is None
    assert strict_labels("1. correct: a\n1. correct: b", 2) is None
    assert strict_labels("", 0) == []


def test_rates():
    found = rates(
        [JudgedText(["A  cat", "It is", "Two"], ["hallucination", "correct", "?"]), JudgedText(["A b"], None)]
    )
    assert found["num_images"] == 2 and found["sents_per_image"] == 2 and found["words_per_image"] == 4
    assert found["hal_sents_per_image"] == 0.5 and found["hal_words_per_image"] == 1.5
    assert found["hal_sents_ratio"] == 0.5 and found["hal_words_ratio"] == 0.6


def test_repetition():
    assert distinct_share("a b, a b. a", 1) == 2 / 5 and distinct_share("a b, a b. a", 2) == 2 / 4
    assert distinct_share("a\nb", 1) == 1 and distinct_share("a b", 3) is None


def test_without_a_judge_lengths_and_repetitions_are_measured(shr, tmp_path):
    result = run("shr", shr, FakeEngine(ANSWERS), tmp_path / "o", model="m", progress=False)
    report = result.reports["strict"]
    line = report.table["all"]
    assert line["sents_per_image"] == 2 and line["words_per_image"] == pytest.approx((9 + 6 + 7) / 3)
    assert line["gram-1-repetition"] == pytest.approx((8 / 14 + 1 + 1) / 3) and "mean_hal_ratio" not in line
    assert result.reports["compat"].table["all"]["gram-1-repetition"] == 0.857
    assert report.metric == "gram-4-repetition, no judge" and report.overall == pytest.approx((9 / 11 + 2) / 3)
    short = run("shr", shr, FakeEngine(dict.fromkeys(ANSWERS, "")), tmp_path / "e", model="m", progress=False)
    assert json.loads(short.files["report"].read_text())["accuracy"] is None


def test_a_judge_reads_each_sentence(shr, server, tmp_path):
    server.reply = lambda prompt: VERDICTS[image_of(prompt)]
    judge = HttpJudge(server.url, tmp_path / "j.jsonl")
    result = run("shr", shr, FakeEngine(ANSWERS), tmp_path / "o", model="m", progress=False, judge=judge)
    for mode, report in result.reports.items():
        assert report.overall == pytest.approx(2 / 6) and report.unparsed == 0, mode
        assert report.table["all"]["hal_words_ratio"] == pytest.approx(9 / 22, abs=5e-4)
    rows = result.reports["strict"].rows
    assert rows[1][:2] == ("1 of 3 hallucinated", 1 - 1 / 3) and "2. hallucination" in rows[1].log
    assert judge.asked == 3  # both modes read the same replies
    prompt = server.asked[0][2]
    assert (
        "[0.1, 0.33, 1.01, 0.83]: thing 1" in prompt and "A dog.\nGrass." in prompt and "2. A cat sleeps\n3." in prompt
    )
    metrics = json.loads(result.files["metrics"].read_text())
    assert metrics["mean_hal_ratio"] == metrics["run1"]["hal_sents_ratio"] == 0.333
    assert metrics["run1"]["sents_per_image"] == 2 and metrics["gram-2-repetition"] == round((9 / 13 + 2) / 3, 3)


def test_a_request_of_ones_own(shr, server, tmp_path, capsys):
    """As HA-DPO's, whose three places have no names; what was asked is in the report."""
    server.reply = lambda prompt: VERDICTS[image_of(prompt)]
    write(tmp_path / "ask.txt", "Regions: {}\nFacts: {}\n{{Judgement:}}\n{}")
    write(tmp_path / "responses.json", ANSWERS)
    line = ["evaluate", "--dataset-path", str(shr), "--evaluation-dataset", "shr", "--predictions"]
    line += [str(tmp_path / "responses.json"), "--result-output-path", str(tmp_path / "o"), "--judge-prompt"]
    assert main([*line, str(tmp_path / "ask.txt"), "--judge", server.url]) == 0
    assert server.asked[1][2] == "Regions: [0.1, 0.33, 1.01, 0.83]: thing 2\nFacts: One red car.\n{Judgement:}\n1. " + (
        "Two cars stand near a tree"
    )
    (report,) = (tmp_path / "o").glob("*_report.json")
    assert len(json.loads(report.read_text())["scores"]["strict"]["notes"]["judge_prompt_sha256"]) == 64
    capsys.readouterr()
    cases = {"{regions} {facts}": "has the places ['regions', 'facts']", "{regions": "cannot read the judge's request"}
    for text, words in cases.items():
        write(tmp_path / "bad.txt", text)
        assert main([*line, str(tmp_path / "bad.txt"), "--judge", server.url]) != 0
        assert words in capsys.readouterr().err
    assert main([*line, str(tmp_path / "ask.txt")]) != 0
    assert "is what shr's judge is asked with" in capsys.readouterr().err


def test_recorded_verdicts_give_the_same_report(shr, server, tmp_path):
    server.reply = lambda prompt: VERDICTS[image_of(prompt)]
    asked = HttpJudge(server.url, tmp_path / "j.jsonl")
    first = run("shr", shr, FakeEngine(ANSWERS), tmp_path / "a", model="m", progress=False, judge=asked)
    recorded = RecordedJudge(first.files["judgement"])
    again = run("shr", shr, FakeEngine(ANSWERS), tmp_path / "b", model="m", progress=False, judge=recorded)
    for kind in ("report", "judgement", "metrics", "accuracy"):
        assert again.files[kind].read_bytes() == first.files[kind].read_bytes(), kind
    other = ANSWERS | {2: "A bus."}
    with pytest.raises(DataError, match="judges another description of image 2"):
        evaluation.score("shr", other, shr, judge=recorded)


def test_an_image_that_nobody_judged_is_told_and_left_out(shr, tmp_path):
    """HA-DPO's file without the images whose prompt was too long, and with a reply of too few lines."""
    verdicts = {
        "1": {"raw_judgement": VERDICTS[1], "mode_response": ANSWERS[1]},
        "3": {"raw_judgement": VERDICTS[2], "model_response": ANSWERS[3]},
    }
    write(tmp_path / "judgement.json", {"run1": verdicts})
    judge = RecordedJudge(tmp_path / "judgement.json")
    strict, compat = (evaluation.score("shr", ANSWERS, shr, mode, judge=judge) for mode in ("strict", "compat"))
    assert strict.overall == compat.overall == pytest.approx(1 / 3)
    assert strict.unparsed == 2 and strict.notes == {"images_judged": 1, "images_left_out": 0}
    assert compat.unparsed == 1 and compat.notes == {"images_judged": 1, "images_left_out": 1}
    assert compat.table["all"]["sents_per_image"] == 2.5
    assert "not counted" in strict.rows[3].log and "left out" in compat.rows[2].log


def test_long_prompts_are_left_out_as_ha_dpo_does(shr, tmp_path):
    write(shr / "shr_factual_part1.jsonl", lines({"1": ["word " * 3000]}))
    verdicts = {str(n): {"raw_judgement": VERDICTS[n], "model_response": ANSWERS[n]} for n in ANSWERS}
    write(tmp_path / "judgement.json", {"run1": verdicts})
    judge = RecordedJudge(tmp_path / "judgement.json")
    strict, compat = (evaluation.score("shr", ANSWERS, shr, mode, judge=judge) for mode in ("strict", "compat"))
    assert strict.overall == pytest.approx(2 / 6) and compat.overall == pytest.approx(1 / 3)
    assert compat.table["all"]["num_images"] == 2 and compat.table["all"]["mean_hal_ratio"] == 0.333


def test_nonsense_is_asked_for_again_and_judgements_outlive_a_judge_that_goes(shr, server, tmp_path):
    asked = []

    def reply(prompt):
        asked.append(image_of(prompt))
        return VERDICTS[image_of(prompt)] if len(asked) > 2 else "I would say it is fine."

    server.reply = reply
    judge = HttpJudge(server.url, tmp_path / "j.jsonl", waits=())
    server.statuses = [200] * 4 + [500]
    with pytest.raises(DataError, match=r"cannot be asked: HTTP Error 500.*run again"):
        run("shr", shr, FakeEngine(ANSWERS), tmp_path / "o", model="m", progress=False, judge=judge)
    assert asked == [1, 1, 1, 2, 3] and len((tmp_path / "j.jsonl").read_text().splitlines()) == 2
    judge = HttpJudge(server.url, tmp_path / "j.jsonl", waits=())
    result = run("shr", shr, FakeEngine({}), tmp_path / "o", model="m", progress=False, judge=judge)
    assert judge.asked == 1 and result.resumed == 3 and result.reports["strict"].overall == pytest.approx(2 / 6)


def test_a_judge_of_nonsense_gives_no_number(shr, server, tmp_path):
    judge = HttpJudge(server.url, tmp_path / "j.jsonl")
    server.reply = lambda prompt: VERDICTS[1] if image_of(prompt) == 1 else "fine"
    report = evaluation.score("shr", ANSWERS, shr, judge=judge)
    assert report.unparsed == 2 and report.overall == pytest.approx(1 / 3) and judge.asked == 7
    server.reply, server.statuses = (lambda prompt: "fine"), [400]
    judge = HttpJudge(server.url, tmp_path / "k.jsonl")
    with pytest.raises(DataError, match="no verdict that can be read on any of 3 images; its last reply is 'fine'"):
        evaluation.score("shr", ANSWERS, shr, judge=judge)
    assert not (tmp_path / "k.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ([], "holds a list; expected one run"),
        ({"run1": {}, "run2": {}}, "holds 2 runs; expected one run"),
        ({"run1": []}, "holds a list in its run; expected verdicts by image"),
        ({"run1": {"17": {"raw_judgement": "x"}}}, r"j.json, image 17: it has no raw_judgement .* \(1 of 1 images\)"),
        ({"run1": {"1": 5}}, "image 1: it has no raw_judgement or no model_response"),
    ],
)
def test_recorded_verdicts_of_another_form(tmp_path, content, message):
    write(tmp_path / "j.json", content)
    with pytest.raises(DataError, match=message):
        RecordedJudge(tmp_path / "j.json")
    with pytest.raises(DataError, match="cannot read the judge"):
        RecordedJudge(tmp_path / "absent.json")


def test_other_tables_and_styles(shr, table_path, tmp_path):
    with pytest.raises(DataError, match="is not SHR's folder"):
        evaluation.score("shr", {}, table_path)
    with pytest.raises(DataError, match="VLMEvalKit has no prompt for SHR"):
        run("shr", shr, FakeEngine({}), tmp_path, model="m", prompt_style="vlmevalkit")


def test_runs_with_and_without_a_judge_are_not_compared(shr, server, tmp_path):
    server.reply = lambda prompt: VERDICTS[image_of(prompt)]
    judge = HttpJudge(server.url, tmp_path / "j.jsonl")
    runs = [
        run("shr", shr, FakeEngine(ANSWERS), tmp_path / name, model=name, progress=False, judge=own).files["report"]
        for name, own in {"a": judge, "b": None, "c": judge}.items()
    ]
    from evaluation.compare import compare_reports

    with pytest.raises(DataError, match="score both with a judge, or both without"):
        compare_reports(*runs[:2])
    found = compare_reports(runs[0], runs[2])
    assert found.difference == 0 and found.p_mcnemar is None


def test_the_command(golden, shr, tmp_path, capsys):
    out = tmp_path / "out"
    line = ["evaluate", "--dataset-path", str(shr), "--evaluation-dataset", "shr", "--result-output-path", str(out)]
    model = ["--model", str(golden / "models" / "llava_hf"), "--device", "cpu", "--max-new-tokens", "8", "--limit", "1"]
    assert main([*line, *model, "--json"]) == 0
    printed = capsys.readouterr().out
    assert "SHR, strict scoring: gram-4-repetition, no judge" in printed
    report = json.loads((out / "llava_hf_shr_report.json").read_text())
    assert report["decoding"]["num_beams"] == 5 and report["decoding"]["max_new_tokens"] == 8
    write(tmp_path / "responses.json", ANSWERS)
    verdicts = {str(n): {"raw_judgement": VERDICTS[n], "model_response": ANSWERS[n]} for n in ANSWERS}
    write(tmp_path / "judgement.json", {"run1": verdicts})
    recorded = ["--predictions", str(tmp_path / "responses.json"), "--judge", str(tmp_path / "judgement.json")]
    assert main([*line, *recorded, "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["accuracy"] == pytest.approx(2 / 6) and set(told["files"]) >= {"judgement", "metrics"}
