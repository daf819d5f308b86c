"""Letter P: the quickstart's sheet shows wrong answers, too."""

import pytest
from PIL import Image

from examples.quickstart.plots import sheet_selection, sheet_title
from examples.quickstart.results import Answer

OPTIONS = dict(zip("ABCD", ("one", "two", "three", "four"), strict=True))


def answers(wrong, count=360):
    drawn = Image.new("L", (8, 8))
    return [
        Answer(drawn, f"Question {place}", OPTIONS, "A", "B" if place in wrong else "A", place not in wrong)
        for place in range(count)
    ]


@pytest.mark.parametrize("missed", [1, 3, 6, 40])
def test_wrong_answers_are_on_the_sheet(missed):
    given = answers({9 * place + 5 for place in range(missed)})
    chosen = sheet_selection(given)
    assert len(chosen) == 24 == len({answer.question for answer in chosen})
    shown = [answer for answer in chosen if not answer.hit]
    assert len(shown) >= min(missed, 6) and not chosen[-1].hit
    assert sheet_title(given, chosen, 0.9).startswith("90.0% of 360 held-out digits right; the sheet shows ")
    assert f"shows {len(shown)} of the {missed} wrong answers" in sheet_title(given, chosen, 0.9)


def test_without_wrong_answers_the_sheet_is_spread_over_the_set():
    given = answers(set())
    chosen = sheet_selection(given)
    assert [answer.question for answer in chosen] == [f"Question {15 * place}" for place in range(24)]
    assert sheet_title(given, chosen, 1.0) == "100.0% of 360 held-out digits right"


def test_a_small_set_is_shown_whole():
    given = answers({2}, count=5)
    assert {answer.question for answer in sheet_selection(given)} == {f"Question {place}" for place in range(5)}
