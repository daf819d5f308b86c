"""Exact answers, by the rules of the grounding sets."""

import pytest

from evaluation.scorers.final_answer import exact_metrics, final_answer


@pytest.mark.parametrize(
    ("text", "form", "answer"),
    [
        ("The man is left. So the answer is yes.", "sentence", "yes"),
        ("The answer is no .", "sentence", "no"),
        ("Answer: 3.5", "sentence", "3.5"),
        ("Answer: a. The answer is b.", "sentence", None),
        ("yes", "sentence", None),
        ("the answer is yes.", "sentence", None),
        ("The answer is a red hat. It is old.", "point_qa", "a red hat"),
        ("The answer is a red hat", "point_qa", None),
        ("Answer: a hat.", "point_qa", None),
    ],
)
def test_the_words_behind_the_answer_is(text, form, answer):
    assert final_answer(text, form) == answer


def test_exact_metrics():
    targets = ["The answer is yes.", "The answer is no.", "yes", "The answer is Yes."]
    said = ["So the answer is yes.", "no", "The answer is yes.", "The answer is yes."]
    assert exact_metrics(said, targets) == {"accuracy": 0.25, "target_failed": 1, "failed": 1}
    assert exact_metrics([], [])["accuracy"] == 0
    with pytest.raises(ValueError, match="shorter"):
        exact_metrics(["a"], [])
