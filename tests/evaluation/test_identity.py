"""Letter M: a table is compared with the benchmark that was named; another one's is refused, with the right name."""

import pytest
from evaluation_helpers import choice_rows, image_cell, write_table

import mindspeed_mm as mm
from mindspeed_mm.errors import DataError


def open_rows(answer: str, count: int = 3) -> list[dict[str, str]]:
    return [
        {"index": str(number), "image": image_cell(), "question": f"What is number {number}?", "answer": answer}
        for number in range(count)
    ]


def yes_no_rows(category: str) -> list[dict[str, str]]:
    return [row | {"answer": "Yes", "category": category} for row in open_rows("")]


def other_forms(answer: str, columns: str = "{}") -> list[dict[str, str]]:
    """Multiple choice whose answers and columns of options are written in another way."""
    named = {name: columns.format(name.lower()) for name in "ABC"} if columns != "{}" else {}
    rows = [row | {"answer": answer.format(row["answer"].lower())} for row in choice_rows()]
    return [{named.get(name, name): cell for name, cell in row.items()} for row in rows]


def rotated_rows() -> list[dict[str, str]]:
    rows = choice_rows(2)
    return rows + [row | {"index": str(1_000_000 + int(row["index"])), "image": image_cell()} for row in rows]


TEN = str(["cat"] * 10)
WRONG = [
    ("chartqa_test", choice_rows(), "it is multiple choice .* and that benchmark asks open questions"),
    (
        "mme",
        [row | {"image_path": "a.png"} for row in yes_no_rows("random")],
        "its categories .random. are those of POPE.*pope",
    ),
    (
        "docvqa_val",
        [row | {"split": "test_human"} for row in open_rows("4")],
        "its splits .* are those of ChartQA_TEST",
    ),
    ("textvqa_val", open_rows("cat"), "each row has one accepted answer"),
    ("chartqa_test", open_rows(TEN), "each row has the answers of 10 people"),
    ("ai2d_test", rotated_rows(), "asks each question in rotated forms"),
    ("mmbench_dev_en", choice_rows(), "no question is asked in rotated forms"),
    (
        "mmbench_dev_en",
        [row | {"question": "这是什么?"} for row in rotated_rows()],
        "most of its questions are Chinese.*mmbench_dev_cn",
    ),
]

WRITTEN_OTHERWISE = [
    ("gqa_testdev_balanced", other_forms("{}"), r"columns A and B hold options and the answers are letters"),
    ("chartqa_test", other_forms(" ({})."), r"columns A and B hold options and the answers are letters"),
    (
        "chartqa_test",
        other_forms("{}", "{} "),
        r"columns a  and b  hold options, which are called A, B, .* rename them",
    ),
    ("coco_val", other_forms("{}.", "option_{}"), r"columns option_a and option_b hold options, .* rename them"),
    (
        "coco_val",
        [row | {"answer": "Yes."} for row in open_rows("")],
        "it is yes-no questions .all answers are yes or no., and that benchmark asks captions",
    ),
    (
        "chartqa_test",
        [row | {"answer": "yes."} for row in yes_no_rows("Random ")],
        "its categories .Random . are those of POPE",
    ),
]


@pytest.mark.parametrize(("name", "rows", "message"), WRITTEN_OTHERWISE)
def test_letter_d_a_table_written_otherwise_is_not_scored_as_another_kind(tmp_path, name, rows, message):
    with pytest.raises(DataError, match=f"is no table of (?i:{name}): .*{message}"):
        mm.score(name, {int(row["index"]): "A" for row in rows}, write_table(tmp_path / "table.tsv", rows))


def test_letter_f_the_advice_is_for_what_the_table_asks(tmp_path):
    """Yes. with a full stop is no open question, and a. no text."""
    rows = [row | {"answer": "Yes."} for row in open_rows("")]
    with pytest.raises(DataError, match="expected Yes or No.$"):
        mm.score("pope", {0: "Yes"}, write_table(tmp_path / "table.tsv", rows))
    with pytest.raises(DataError, match="expected Yes or No. It may be ai2d_test"):
        mm.score("pope", {0: "Yes"}, write_table(tmp_path / "table.tsv", other_forms("{}.")))


@pytest.mark.parametrize("kind", ["ai2d_test", "my_questions", "pope"])
def test_letter_g_a_row_without_its_answer_is_named(tmp_path, kind):
    """It was told that the table had no answers, and nothing was scored."""
    rows = open_rows("Yes") if kind == "pope" else choice_rows(3)
    rows[1]["answer"] = " "
    with pytest.raises(DataError, match=r"row with index 1: the answer is empty \(1 of 3 rows\), but other rows have"):
        mm.score(kind, {0: "A"}, write_table(tmp_path / "table.tsv", rows))


@pytest.mark.parametrize(
    ("name", "rows", "message"), WRONG, ids=[f"{name} {message[:20]}" for name, _, message in WRONG]
)
def test_letter_m_a_table_of_another_benchmark_is_refused(tmp_path, name, rows, message):
    table = write_table(tmp_path / "table.tsv", rows)
    answers = {int(row["index"]): "A" for row in rows}
    for accept_table in (False, True):  # these are proofs, which nobody can overrule
        with pytest.raises(DataError, match=f"is no table of (?i:{name}): .*{message}"):
            mm.score(name, answers, table, accept_table=accept_table)


def test_letter_m_a_file_name_is_a_sign_that_can_be_overruled(tmp_path):
    table = write_table(tmp_path / "MMStar.tsv", choice_rows(2))
    answers = {0: "A", 1: "B"}
    with pytest.raises(DataError, match="the name of the file says MMStar.*--accept-table"):
        mm.score("ai2d_test", answers, table)
    report = mm.score("ai2d_test", answers, table, accept_table=True)
    assert [row["hit"] for row in report.rows.values()] == [1, 1]


def test_letter_m_a_part_of_a_public_table_and_a_table_of_ones_own_are_scored(tmp_path):
    answers = {0: "A", 1: "B"}
    for name, file in (("ai2d_test", "AI2D_TEST_part2.tsv"), ("my_questions", "my_questions.tsv")):
        report = mm.score(name, answers, write_table(tmp_path / file, choice_rows(2)))
        assert [row["hit"] for row in report.rows.values()] == [1, 1]


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("chartqa_test", open_rows("cat"), "it has no column split"),
        ("mmmu_dev_val", choice_rows(2), "it has no column split"),
        ("vqav2", open_rows("['cat', 'dog']"), "no row has the answers of 10 people, 2 at most"),
        ("gqa", open_rows("['cat', 'dog']"), "rows have several accepted answers, and that one has one"),
        ("infovqa", open_rows("12.5"), "no answer is a list of accepted texts"),
        ("pope", yes_no_rows("VD"), "none of its categories (vd) is one of POPE"),
        (
            "mmstar",
            [row | {"answer": "C", "C": ""} for row in choice_rows(2)],
            "the right answer of 2 rows is no option",
        ),
        ("coco_val", open_rows("cat"), "its rows ask 3 different questions, and captions answer one"),
    ],
)
def test_letter_m_a_table_of_another_form_is_told(tmp_path, caplog, name, rows, message):
    table, answers = write_table(tmp_path / "table.tsv", rows), {int(row["index"]): "A" for row in rows}
    mm.score(name, answers, table, accept_table=True)
    assert not caplog.messages
    mm.score(name, answers, table)
    (told,) = caplog.messages
    assert "whose public table has another form: " + message in told


@pytest.mark.parametrize(
    "name", ["MMVet", "ocrbench_v2", "MathVista_MINI", "llava-bench-in-the-wild", "HallusionBench"]
)
def test_letter_m_a_public_name_whose_score_is_not_computed_is_refused(tmp_path, name):
    table = write_table(tmp_path / "t.tsv", open_rows("12<OR>13"))
    with pytest.raises(
        DataError, match=f"{name} is the name of .*is not computed here.*a name of your own, such as own_"
    ):
        mm.score(name, {0: "A", 1: "A", 2: "A"}, table)
    assert mm.score(f"own_{name}", {0: "A", 1: "A", 2: "A"}, table).overall == 0


@pytest.mark.parametrize("name", ["ocr_benchmark", "amber_alerts", "mm_veterinary", "mathvisionary"])
def test_letter_m_a_name_of_ones_own_that_only_begins_like_a_public_one_is_scored(tmp_path, name):
    table = write_table(tmp_path / "t.tsv", open_rows("12<OR>13"))
    assert mm.score(name, {0: "A", 1: "A", 2: "A"}, table).overall == 0


def test_images_are_followed_by_what_the_family_knows():
    """A question's images stand before it; only LLaVA's models know a line feed behind each."""
    from evaluation.model_engine import placed
    from mindspeed_mm.models.spec import find_family

    turns = (("<image>\n<image>\nWhat is it?\nAnswer briefly.", None),)
    assert placed(turns, find_family("llava").after_image) == turns
    wanted = (("<image><image>What is it?\nAnswer briefly.", None),)
    assert placed(turns, find_family("qwen2_5_vl").after_image) == wanted
