"""Boxes as text: format and parse undo each other in every notation; what models really write."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_mm.data.grounding.notation import NOTATIONS, BinNotation, BracketNotation, notation, parse_lenient
from mindspeed_mm.errors import ConfigError

STEPS = {"square": 1000, "round": 1000, "bins": 1000, "minigpt_v2": 100, "qwen2_vl": 1000, "internvl": 1000}
BOX = [0.25, 0.5, 0.75, 1.0]
WRITTEN = {
    "square": "[0.250,0.500,0.750,1.000]",
    "round": "(0.250,0.500,0.750,1.000)",
    "bins": "<b_st><bin_250> <bin_500> <bin_750> <bin_1000><b_ed>",
    "minigpt_v2": "{<25><50><75><100>}",
    "qwen2_vl": "<|box_start|>(250,500),(750,1000)<|box_end|>",
    "internvl": "<box>[[250, 500, 750, 1000]]</box>",
}


@pytest.mark.parametrize("name", NOTATIONS)
def test_written_forms(name):
    assert NOTATIONS[name].format([BOX]) == WRITTEN[name]
    assert NOTATIONS[name].parse(f"It is {WRITTEN[name]}.") == [[BOX]]


@pytest.mark.parametrize("name", NOTATIONS)
@pytest.mark.parametrize("size", [2, 4])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_parse_undoes_format(name, size, data):
    steps = STEPS[name]
    whole = st.lists(st.integers(0, steps), min_size=size, max_size=size)
    entries = [[n / steps for n in entry] for entry in data.draw(st.lists(whole, min_size=1, max_size=3))]
    words = data.draw(st.text("ab {}.\n", max_size=5))
    text = f"{words}{NOTATIONS[name].format(entries)}{words}"
    assert NOTATIONS[name].parse(text, size) == [entries]
    assert NOTATIONS[name].parse(text, 6 - size) == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_the_error_is_half_a_step(values):
    for name, steps in STEPS.items():
        ((found,),) = NOTATIONS[name].parse(NOTATIONS[name].format([values]))
        most = 1.0 if name == "minigpt_v2" else 0.5  # its numbers are cut off
        assert all(abs(a - b) <= most / steps + 1e-9 for a, b in zip(found, values, strict=True))


def test_minigpt_v2_cuts_off():
    style = NOTATIONS["minigpt_v2"]
    assert style.format([[0.129999, 0.999, 0.29, 1.0]]) == "{<12><99><29><100>}"


def test_the_words_of_bins():
    words = BinNotation().words
    assert len(words) == len(set(words)) == 1007 and words[:2] == ("<b_st>", "<b_sep>") and words[-1] == "<bin_1000>"
    assert BinNotation().parse("<b_st><bin_1> <bin_2> <bin_3> <bin_1001><b_ed>") == []


def test_what_no_notation_writes_is_not_read():
    assert NOTATIONS["minigpt_v2"].parse("{<25><50><75><101>}") == []
    assert NOTATIONS["square"].parse("[10.5,0.2,0.3,0.4] [x0,y0,x1,y1] [0.1,0.2,0.3]") == []


@pytest.mark.parametrize(
    ("name", "text", "box"),
    [
        ("square", "[ 0.1, 0.2,0.3 ,0.4 ]", [0.1, 0.2, 0.3, 0.4]),
        ("square", "[-0.01,.2,0.3,0.4]", [0, 0.2, 0.3, 0.4]),
        ("internvl", "<box>[[1,2,3,4]]</box>", [0.001, 0.002, 0.003, 0.004]),
    ],
)
def test_the_lenient_mode_says_that_it_was_needed(name, text, box):
    assert NOTATIONS[name].parse(text) == []
    assert parse_lenient(text, NOTATIONS[name]) == ([[box]], True)
    assert parse_lenient(WRITTEN[name], NOTATIONS[name]) == ([[BOX]], False)
    assert parse_lenient("none", NOTATIONS[name]) == ([], False)


def test_unknown_notations():
    assert notation("round", 2) == BracketNotation("round", 2)
    with pytest.raises(ConfigError, match='unknown notation of boxes "squares"; did you mean "square"'):
        notation("squares")
    with pytest.raises(ConfigError, match='precision is of brackets .*"bins", remove it'):
        notation("bins", 2)
    with pytest.raises(ConfigError, match='found the brackets "curly"'):
        BracketNotation("curly")
    with pytest.raises(ConfigError, match="found a precision of -1"):
        BracketNotation("square", -1)
