"""Shikra's own values (tests/data/golden_eval) against what data sets write and read."""

import json

import pytest

from mindspeed_mm.data.grounding.fill import written_turns
from mindspeed_mm.data.grounding.geometry import ExpandToSquare, fractions, moved
from mindspeed_mm.data.grounding.item import read_item
from mindspeed_mm.data.grounding.notation import BinNotation, BracketNotation, notation
from mindspeed_mm.errors import DataError


@pytest.fixture(scope="module")
def cases_of(golden_eval):
    """cases_of(name) -> (inputs, output) of one of Shikra's functions."""
    text = (golden_eval / "functions.json").read_text()
    cases = json.loads(text)
    return lambda name: [(case["inputs"], case["output"]) for case in cases if case["scorer"] == f"shikra_{name}"]


def test_boxes_and_points_as_text_and_back(cases_of):
    for given, text in cases_of("box_format"):
        style = BracketNotation(given["brackets"], given.get("precision", 3))
        assert style.format(given["boxes"]) == text
    for name, size in (("box_extract", 4), ("point_extract", 2)):
        for given, groups in cases_of(name):
            assert BracketNotation(given["brackets"]).parse(given["text"], size) == groups


def test_boxes_as_words_and_back(cases_of):
    for given, text in cases_of("token_box_format"):
        assert BinNotation(given["num_bins"]).format(given["boxes"]) == text
    for given, groups in cases_of("token_box_extract"):
        assert BinNotation(given["num_bins"]).parse(given["text"]) == [
            [pytest.approx(box) for box in group] for group in groups
        ]


def test_geometry(cases_of):
    for given, box in cases_of("norm_box"):
        assert fractions(given["box"], given["width"], given["height"]) == pytest.approx(box, abs=1e-9)
    for given, box in cases_of("expand2square_box"):
        size = (given["width"], given["height"])
        assert moved(given["box"], size, (ExpandToSquare(),)) == pytest.approx(box, abs=1e-9)


def test_placeholders_of_an_item(cases_of):
    """Whatever Shikra fills, an item fills alike; where its code stops at braces or counts, ours fills or refuses."""
    equal, cases = 0, cases_of("fill_placeholders")
    for given, text in cases:
        size = (given["width"], given["height"])
        target = {"boxes": given["boxes"], "width": size[0], "height": size[1]}
        turn = {"from": "human", "value": given["value"], "boxes_seq": given["boxes_seq"]}
        try:
            item = read_item({"image": "a.png", "target": target, "conversations": [turn]})
        except DataError:  # a wrong count
            assert isinstance(text, dict)
            continue
        found = written_turns(item, notation(given["brackets"]), lambda _, size=size: size)[0].text
        if isinstance(text, str):
            assert found == text
            equal += 1
    assert equal == sum(isinstance(text, str) for _, text in cases)
