"""What holds for any answer: scores stay in range, nothing raises, nothing in a cell is run."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.scorers import anls, boxes, cells, exact, mmmu_open, relaxed, science, vqa, yesno

TEXT = st.text("aA b'\"[](){},.:;%-+*/0123456789eEyesno\u732b\uff11\n", max_size=30) | st.text(max_size=12)
ANSWER = TEXT | st.lists(TEXT, min_size=1, max_size=4).map(repr)
RULES = (
    lambda a, p: max(relaxed.kit_matches(a, p)) if cells.kit_answers(a) else 0,
    relaxed.strict_match,
    lambda a, p: anls.kit_score(a, p) if cells.kit_answers(a) else 0,
    anls.strict_score,
    lambda a, p: vqa.kit_score(a, p) if cells.kit_answers(a) else 0,
    vqa.strict_score,
    exact.strict_score,
    mmmu_open.strict_correct,
)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=60, deadline=None)
@given(ANSWER, TEXT)
def test_scores_are_between_0_and_1(rule, answer, prediction):
    assert 0 <= rule(answer, prediction) <= 1 + 1e-12


@settings(max_examples=60, deadline=None)
@given(st.text("abc XYZ", min_size=1, max_size=10))
def test_the_right_answer_is_right(answer):
    for rule in (relaxed.strict_match, anls.strict_score, vqa.strict_score, exact.strict_score):
        assert rule(answer, f" {answer}</s>") == 1


@settings(max_examples=80, deadline=None)
@given(TEXT)
def test_readers_give_known_words(text):
    assert yesno.kit_answer(text) in ("Yes", "No", "Unknown")
    assert yesno.strict_answer(text) in ("yes", "no", "unknown")
    assert yesno.pope_strict_answer(text) in ("yes", "no", "unknown")
    assert yesno.pope_llava_answer(text) in ("yes", "no")
    assert science.strict_index(text, 4) in (None, 0, 1, 2, 3)
    assert vqa.strict_normalise(vqa.strict_normalise(text)) is not None


@settings(max_examples=80, deadline=None)
@given(st.decimals(-(10**6), 10**6, places=2))
def test_five_per_cent_is_exact_and_relative_to_the_truth(value):
    truth = Fraction(value)
    for factor, right in ((Fraction(105, 100), True), (Fraction(95, 100), True), (Fraction(106, 100), truth == 0)):
        given_ = truth * factor
        text = f"{given_.numerator * 10**4 // given_.denominator}"
        written = f"{int(text) / 10**4:.4f}"
        if Fraction(written) == given_:
            assert relaxed.strict_match(str(value), written) is right


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1000), min_size=4, max_size=4), min_size=1, max_size=3))
def test_boxes_come_back_from_their_text(thousandths):
    found = [[n / 1000 for n in box] for box in thousandths]
    for brackets in ("square", "round"):
        assert boxes.extract_boxes(boxes.format_boxes(found, brackets), brackets) == [found]
    assert boxes.extract_token_boxes(boxes.format_token_boxes(found, 1001), 1001) == [found]


@pytest.mark.parametrize(
    ("cell", "kit", "strict"),
    [
        ("[1+1]", [2], ["[1+1]"]),
        ("[2*3, 1/2, -4]", [6, 0.5, -4], ["[2*3, 1/2, -4]"]),
        ("[1/0]", ["[1/0]"], ["[1/0]"]),
        ("['a', 'b']", ["a", "b"], ["a", "b"]),
        ("[exit()]", ["[exit()]"], ["[exit()]"]),
        ("[__import__('os')]", ["[__import__('os')]"], ["[__import__('os')]"]),
        ("[10**10**10]", ["[10**10**10]"], ["[10**10**10]"]),
        ("['a'*9]", ["['a'*9]"], ["['a'*9]"]),
        ("[True+1]", ["[True+1]"], ["[True+1]"]),
        ("[", ["["], ["["]),
        ("[" * 5000 + "]" * 5000, ["[" * 5000 + "]" * 5000], ["[" * 5000 + "]" * 5000]),
    ],
)
def test_no_cell_is_run(cell, kit, strict):
    assert cells.kit_answers(cell) == kit
    assert cells.strict_answers(cell) == strict


def test_long_numerals_are_texts():
    assert relaxed.parse_number("1e99999999") is None
    assert relaxed.parse_number("9" * 200) is None
    assert relaxed.parse_number("1,2345") is None
    assert relaxed.parse_number("-.5e1%") == Fraction(-5, 100)
