"""Tables of one's own, other benchmarks, and what is refused."""

import json

import pytest
from evaluation_helpers import choice_rows, image_cell, write_table

import evaluation
from evaluation.benchmarks import find_benchmark, known_benchmarks
from evaluation.questions import read_questions
from mindspeed_mm.errors import DataError


def question_rows(answers, **columns):
    return [
        {"index": str(i), "image": image_cell(), "question": f"Question {i}?", "answer": answer}
        | {name: values[i] for name, values in columns.items()}
        for i, answer in enumerate(answers)
    ]


def table_of(tmp_path, rows):
    return write_table(tmp_path / "t.tsv", rows)


def test_both_spellings_are_known():
    names = set(known_benchmarks())
    guide = "ai2d_test chartqa_test docvqa_val mmmu_dev_val infovqa infographic textvqa_val ocrvqa scienceqa_test"
    guide += " mmbench_dev_en mmbench_dev_cn mmbench_test_en mmbench_test_cn ccbench seedbench pope mme gqa vqav2"
    guide += " realworldqa mmstar rec"
    kit = "InfoVQA_VAL OCRVQA_TEST SEEDBench_IMG GQA_TestDev_Balanced MMBench_DEV_EN_V11 DocVQA_TEST MMMU_TEST"
    assert {name.lower() for name in (guide + " " + kit).split()} <= names


def test_own_questions_are_scored_by_equality(tmp_path):
    path = table_of(tmp_path, question_rows(["red", "['two', '2']", "None"], category=["x", "x", "y"]))
    report = evaluation.score("colours", {0: " Red</s>", 1: "2", 2: "no"}, path)
    assert report.table == {"all": {"Overall": pytest.approx(200 / 3), "x": 100.0, "y": 0.0}}
    assert report.overall == pytest.approx(2 / 3) and report.metric == "exact match"
    assert report.to_csv().splitlines()[0] == '"split","Overall","x","y"'


def test_own_yes_no_questions(tmp_path):
    path = table_of(tmp_path, question_rows(["Yes", "no", "Yes"], category=["x", "x", "y"]))
    report = evaluation.score("mine", {0: "Yes, it is", 1: "There is no dog", 2: "perhaps"}, path)
    assert report.table == {"all": {"Overall": pytest.approx(2 / 3), "x": 1.0, "y": 0.0}}
    assert report.unparsed == 1
    table = read_questions(path)
    prompts = find_benchmark("mine", table).prompts(table, "official")
    assert prompts[0].turns[0][0] == "<image>\nQuestion 0?\nAnswer the question using a single word or phrase."


@pytest.mark.parametrize(("first", "second"), [("(A)", "(B)"), ("\uff21", "\uff22"), ("A)", "B.")])
def test_letter_d_options_in_other_marks_are_options(tmp_path, caplog, first, second):
    rows = [row | {first: "cat", second: "dog", "L2 Category": "x"} for row in question_rows(["A", "B"])]
    report = evaluation.score("mine", {0: "A", 1: "A"}, table_of(tmp_path, rows))
    assert report.table == {"none": {"Overall": 0.5, "x": 0.5}} and f'column "{first}" is read as A' in caplog.text


@pytest.mark.parametrize("names", [("option_a", "option_b"), ("Option 1", "Option 2"), ("choices",), ("Answer A", "b")])
def test_letter_d_options_under_other_names_are_refused(tmp_path, names):
    rows = [row | dict.fromkeys(names, "cat") for row in question_rows(["cat"])]
    with pytest.raises(DataError, match="Read as multiple choice, .* Read as open questions, they are no options"):
        evaluation.score("mine", {0: "cat"}, table_of(tmp_path, rows))


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (["Y", "n."], "all answers are Y or N. Read as yes-no questions"),
        (["['Paris', 'paris"], "Read as one text, put it in a list of one"),
    ],
)
def test_letter_d_answers_of_two_readings_are_refused(tmp_path, answers, message):
    path = table_of(tmp_path, question_rows(answers))
    with pytest.raises(DataError, match=message):
        evaluation.score("mine", dict(enumerate(answers)), path)


def test_letter_d_answers_with_other_spaces_and_stops_are_yes_and_no(tmp_path):
    path = table_of(tmp_path, question_rows(["Yes\u00a0", "No\uff0e"]))
    assert evaluation.score("mine", {0: "yes", 1: "no"}, path).overall == 1.0


def mme_rows():
    names = [("existence", "a"), ("existence", "a"), ("existence", "b"), ("existence", "b"), ("text_translation", "c")]
    return question_rows(
        ["Yes", "No", "Yes", "No", "Yes"],
        category=[category for category, _ in names],
        image_path=[f"{category}/{name}.jpg" for category, name in names],
    )


def test_mme_points(tmp_path):
    path = table_of(tmp_path, mme_rows())
    answers = {0: "Yes", 1: "No", 2: "Yes", 3: "Yes", 4: "Yes."}
    for mode in ("strict", "compat"):
        report = evaluation.score("mme", answers, path, mode)
        assert report.table["points"] == {
            "perception": pytest.approx(75 + 50),
            "reasoning": 200.0,
            "existence": pytest.approx(75 + 50),
            "text_translation": 200.0,
        }
        assert report.overall == pytest.approx(125.0)
        low, high = report.interval
        assert low <= 125 <= high


@pytest.mark.parametrize("name", ["ocrvqa", "gqa", "vqav2", "infovqa", "vizwiz"])
def test_open_benchmarks_without_a_golden_table(tmp_path, name):
    path = table_of(tmp_path, question_rows(["['red', 'red', 'red', 'red', 'red']", "blue"]))
    report = evaluation.score(name, {0: "Red", 1: "green"}, path)
    assert [report.rows[i].score for i in (0, 1)] == [1.0, 0.0]
    compat = evaluation.score(name, {0: "Red", 1: "green"}, path, "compat")
    assert compat.rows[0].score == 1.0


def test_gqa_means_over_answers_in_compat_only(tmp_path):
    path = table_of(tmp_path, question_rows(["['a', 'b']"]))
    assert evaluation.score("gqa", {0: "b"}, path, "compat").overall == 0.5
    assert evaluation.score("gqa", {0: "b"}, path).overall == 1.0


def test_open_questions_of_mmmu(tmp_path):
    rows = choice_rows(2)
    rows[1] |= {"A": "", "B": "", "C": "", "answer": "3.14"}
    path = table_of(tmp_path, rows)
    strict = evaluation.score("mmmu_dev_val", {0: "A", 1: "The answer is 3.141"}, path)
    assert [strict.rows[i].hit for i in (0, 1)] == [1, 1]
    assert evaluation.score("MMMU", {0: "A", 1: "A"}, path, "compat").overall == 1.0  # the answer is option A there
    assert evaluation.score("MMMU", {0: "A", 1: "A"}, path).overall == 0.5


def test_vizwiz_prompt(tmp_path):
    table = read_questions(table_of(tmp_path, question_rows(["x"])))
    (turn,) = find_benchmark("vizwiz", table).prompts(table, "official")[0].turns
    assert turn[0].splitlines()[-2:] == [
        "When the provided information is insufficient, respond with 'Unanswerable'.",
        "Answer the question using a single word or phrase.",
    ]


def test_ocr_words_from_a_column_or_not_at_all(tmp_path, caplog):
    rows = question_rows(["x"], ocr_tokens=["['STOP', 'now']"])
    table = read_questions(table_of(tmp_path, rows))
    text = find_benchmark("textvqa", table).prompts(table, "official")[0].turns[0][0]
    assert text.splitlines()[2] == "Reference OCR token: STOP, now"
    del rows[0]["ocr_tokens"]
    table = read_questions(table_of(tmp_path, rows))
    text = find_benchmark("textvqa", table).prompts(table, "official")[0].turns[0][0]
    assert "OCR" not in text and "the prompts have no OCR line" in caplog.text
    (tmp_path / "ocr_tokens.json").write_text("{}")
    with pytest.raises(DataError, match="no list of words for 1 rows, for example index 0"):
        find_benchmark("textvqa", table).prompts(table, "official")
    (tmp_path / "ocr_tokens.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        find_benchmark("textvqa", table).prompts(table, "official")


def test_very_long_answers(tmp_path):
    long = "A cat. " * 15_000
    path = table_of(tmp_path, question_rows(["red", "[1, 2]"]))
    for name in ("chartqa", "docvqa", "textvqa", "gqa", "mine"):
        for mode in ("strict", "compat"):
            assert evaluation.score(name, {0: long, 1: "9" * 100_000}, path, mode).overall == 0.0
    path = table_of(tmp_path, question_rows(["Yes", "No"], category=["x", "x"], image_path=["a", "a"]))
    for name in ("pope", "mme"):
        assert evaluation.score(name, {0: long, 1: "9" * 100_000}, path).unparsed == 2


def without(rows, column):
    return [{name: cell for name, cell in row.items() if name != column} for row in rows]


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("chartqa_tset", question_rows(["x"]), "no benchmark is called chartqa_tset .nearest: chartqa_test"),
        ("mmbench_dev_e", choice_rows(1), "nearest: mmbench_dev_en"),
        ("mine", without(question_rows(["x"]), "question"), "no benchmark is called mine"),
        ("chartqa", without(question_rows(["x"]), "question"), "lacks column question, which ChartQA_TEST needs"),
        ("pope", without(question_rows(["Yes"]), "question"), "lacks column question, which POPE needs"),
        ("pope", question_rows(["perhaps"]), 'the answer is "perhaps"; expected Yes or No'),
        ("mme", question_rows(["Yes"]), "lacks column category, image_path, which MME needs"),
        ("docvqa", question_rows(["[]"]), "index 0: the answer is an empty list"),
        ("rec", question_rows(["x"]), "lacks expression, bbox, image_path, which REC needs"),
        (
            "mmbench",
            [row | {"index": f"q{row['index']}"} for row in choice_rows(1)],
            "found the index q0, which is no integer",
        ),
    ],
)
def test_what_is_refused(tmp_path, name, rows, message):
    with pytest.raises(DataError, match=message):
        evaluation.score(name, {0: "A"}, table_of(tmp_path, rows))


@pytest.mark.parametrize(("name", "answer"), [("chartqa", ""), ("pope", "")])
def test_scoring_needs_answers(tmp_path, name, answer):
    with pytest.raises(DataError, match="no .*answers in column answer"):
        evaluation.score(name, {0: "A"}, table_of(tmp_path, question_rows([answer])))


def lines(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


QUESTION = {"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "yes"}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (["{"], "line 1 is not JSON"),
        (["[]"], r"found \[\]; expected an object"),
        ([], "has no lines"),
        ([QUESTION, {k: v for k, v in QUESTION.items() if k != "label"}], "question 2: found keys"),
        ([QUESTION, QUESTION], "index 1 is used more than once"),
        ([QUESTION | {"id": 2}], "two keys mean the same column"),
        ([{"question_id": 1, "text": "x"}], "expected image or img_path"),
        ([QUESTION | {"image": "b.jpg"}], "image file b.jpg does not exist"),
    ],
)
def test_json_lines_that_are_refused(tmp_path, records, message):
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=message):
        read_questions(lines(tmp_path / "q.jsonl", *records))


def test_folders_and_files_that_are_no_questions(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="is a folder without coco_pope_random.json"):
        read_questions(tmp_path)
    with pytest.raises(DataError, match="cannot read .*no.jsonl"):
        read_questions(tmp_path / "no.jsonl")
    (tmp_path / "q.jsonl").write_bytes(b"\xff")
    with pytest.raises(DataError, match="is not UTF-8"):
        read_questions(tmp_path / "q.jsonl")
    monkeypatch.setattr("evaluation.questions.MAX_FILE_BYTES", 0)
    with pytest.raises(DataError, match="larger than 0 bytes"):
        read_questions(tmp_path / "q.jsonl")


def test_labels_of_another_release(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    lines(tmp_path / "coco_pope_random.json", QUESTION)
    asked = {"question_id": 7, "image": "a.jpg", "text": "Is it not?", "category": "random"}
    with pytest.raises(DataError, match='has no question "Is it not." on a.jpg'):
        read_questions(lines(tmp_path / "llava.jsonl", asked))


@pytest.mark.parametrize("box", ["[1, 2, 3]", "x", '[1, 2, 3, "4"]'])
def test_boxes_that_are_no_boxes(tmp_path, box):
    (tmp_path / "a.jpg").write_bytes(b"")
    path = lines(tmp_path / "q.jsonl", {"img_path": "a.jpg", "expression": "x", "bbox": box})
    with pytest.raises(DataError, match="expected four numbers"):
        evaluation.score("rec", {0: "[0,0,1,1]"}, path)


def test_a_box_on_two_images(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    record = {"img_path": "['a.jpg', 'a.jpg']", "expression": "x", "bbox": [0, 0, 1, 1]}
    with pytest.raises(DataError, match="index 0: found 2 images; a box needs just one"):
        evaluation.score("rec", {0: "[0,0,1,1]"}, lines(tmp_path / "q.jsonl", record))


def test_rec_has_no_prompt_of_the_kit(golden_eval):
    table = read_questions(golden_eval / "benchmarks" / "rec_shikra" / "REC_golden_test.jsonl")
    with pytest.raises(DataError, match="VLMEvalKit has no prompt for REC"):
        find_benchmark("rec", table).prompts(table, "vlmevalkit")


def test_missing_rotations_fail_in_strict_only(tmp_path):
    rows = choice_rows(1)
    path = table_of(tmp_path, rows)
    assert evaluation.score("mmbench_dev_en", {0: "A"}, path, "compat").overall == 1.0
    report = evaluation.score("mmbench_dev_en", {0: "A"}, path)
    assert (report.overall, report.notes) == (0.0, {"questions_without_all_rotations": 1})
