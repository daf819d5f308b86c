"""The item schema: what is read, and each thing that is refused, with its field."""

import copy

import pytest

from mindspeed_mm.data.grounding.fill import written_turns
from mindspeed_mm.data.grounding.geometry import ExpandToSquare
from mindspeed_mm.data.grounding.item import read_item
from mindspeed_mm.data.grounding.notation import notation
from mindspeed_mm.errors import DataError

ITEM = {
    "image": "a.jpg",
    "target": {"boxes": [[0, 0, 50, 50], [10, 20, 30, 40]], "points": [[5, 6]], "width": 100, "height": 50},
    "conversations": [
        {"from": "human", "value": "<image>\nIs {this} at <points>?", "points_seq": [[0]]},
        {"from": "gpt", "value": "The man<boxes> and both<boxes>.", "boxes_seq": [[1], [0, 1]]},
    ],
}


def changed(path, value):
    """ITEM with another value at a path of keys; None removes it."""
    item = copy.deepcopy(ITEM)
    place = item
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return item


def texts(record, style="square", steps=(), **options):
    item = read_item(record, **options)
    turns = written_turns(item, notation(style), lambda number: (100, 50), steps, **options)
    return [turn.text for turn in turns]


def test_boxes_become_text_and_braces_stay():
    assert texts(ITEM) == [
        "<image>\nIs {this} at [0.050,0.120]?",
        "The man[0.100,0.400,0.300,0.800] and both[0.000,0.000,0.500,1.000;0.100,0.400,0.300,0.800].",
    ]
    padded = texts(ITEM, "round", (ExpandToSquare(),))
    assert padded[0].endswith("(0.050,0.310)?") and padded[1].startswith("The man(0.100,0.450,0.300,0.650)")


def test_several_images_have_pairs():
    record = {
        "image": ["a.jpg", "b.jpg"],
        "target": [{"boxes": [[0, 0, 50, 50]]}, {"points": [[50, 25]]}],
        "conversations": [
            {"from": "human", "value": "<image><image> <points>", "points_seq": [[[1, 0]]]},
            {"from": "gpt", "value": "<boxes>", "boxes_seq": [[[0, 0]]], "loss": False},
        ],
    }
    assert texts(record) == ["<image><image> [0.500,0.500]", "[0.000,0.000,0.500,1.000]"]
    assert [turn.learned for turn in read_item(record).turns] == [True, False]


def test_turns_say_which_image_they_show():
    turns = [
        {"from": "human", "value": "<image> or <image>?", "image_seq": [1, 0]},
        {"from": "gpt", "value": "The first."},
        {"from": "human", "value": "And <image>?", "image_seq": [1]},
        {"from": "gpt", "value": "<boxes>", "boxes_seq": [[[1, 0]]]},
    ]
    record = {"image": ["a.jpg", "b.jpg"], "target": [{}, {"boxes": [[0, 0, 50, 50]]}], "conversations": turns}
    item = read_item(record)
    assert item.shown == ("b.jpg", "a.jpg", "b.jpg") and item.images == ("a.jpg", "b.jpg")
    assert texts(record)[3] == "[0.000,0.000,0.500,1.000]"
    for number, value, message in (
        (0, [1], r"conversations\[0\].image_seq is \[1\], and the text holds 2 <image>; expected the number"),
        (2, None, r"conversations\[2\].image_seq is \[\], and the text holds 1 <image>"),
        (0, [1, 1], r"names the images \[1\], and there are 2, counted from 0; expected each of them"),
        (0, [1, 5], r"names the images \[1, 5\], and there are 2"),
    ):
        with pytest.raises(DataError, match=message):
            read_item(
                record
                | {"conversations": [*turns[:number], turns[number] | {"image_seq": value}, *turns[number + 1 :]]}
            )
    with pytest.raises(DataError, match=r'conversations\[0\].image_seq is given, and "image" is no list'):
        read_item(changed(["conversations", 0, "image_seq"], [0]))


def test_more_decimals_than_shikra_writes():
    thirds = changed(["target", "boxes", 1], [0, 0, 100 / 3, 50 / 3])
    item, style = read_item(thirds), notation("square", 5)
    assert "[0.00000,0.00000,0.33333,0.33333]" in written_turns(item, style, lambda _: (100, 50))[1].text


def test_normalised_boxes():
    record = changed(["target"], {"boxes": [[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]], "points": [[0.5, 0.5]]})
    assert texts(record, normalised=True)[0].endswith("[0.500,0.500]?")
    with pytest.raises(DataError, match=r'target.boxes\[0\] .* looks like fractions .*"normalised": true'):
        read_item(record)
    with pytest.raises(DataError, match=r"boxes\[1\] is \[10, 20, 30, 40\]; expected fractions"):
        read_item(changed(["target", "boxes", 0], [0.0, 0.0, 1.0, 1.0]), normalised=True)


TURN = ["conversations", 1]
BROKEN = [
    (["target", "boxes", 0], [50, 0, 0, 50], r"target.boxes\[0\] .* right or bottom lies before"),
    (["target", "boxes", 0], [0, 0, 101, 50], r"target.boxes\[0\] is .* outside of the image of 100 x 50"),
    (["target", "points", 0], [5, 51], r"target.points\[0\] is .* outside"),
    (["target", "boxes", 0], [-1, 0, 10, 50], r"expected pixels inside of the image, 0 or more"),
    (["target", "boxes", 0], [1, 0, 10], r"expected 4 finite numbers, left, top"),
    (["target", "points", 0], [1, float("nan")], r"expected 2 finite numbers, x and y"),
    (["target", "boxes"], 3, r"target.boxes is 3; expected a list of lists of 4"),
    (["target", "width"], None, r"width None and height 50; expected both"),
    (["target"], [1], r'"target" is \[1\] and the record has 1 images'),
    (["target"], "x", r"target is 'x'; expected an object"),
    (["target", "boxs"], [1], r'did you mean "boxes"'),
    (["image"], None, r'"target" is .* and the record has 0 images'),
    (["conversations"], [], r'"conversations" is \[\]; expected a list of turns'),
    ([*TURN, "from"], "robot", r'expected an object from "human" or "gpt"'),
    (["conversations", 0, "from"], "gpt", r"is an answer with <image>"),
    ([*TURN, "boxes_seq"], None, r"conversations\[1\].boxes_seq is missing, and the text holds 2 <boxes>"),
    ([*TURN, "boxes_seq"], [[0]], r"boxes_seq has 1 entries, and the text holds 2 <boxes>"),
    ([*TURN, "boxes_seq"], [0, 1], r"expected a list with a list of numbers for each <boxes>"),
    ([*TURN, "boxes_seq"], [[0], [2]], r"boxes_seq\[1\] names 2, and there are 2 boxes, counted from 0"),
    ([*TURN, "boxes_seq"], [[0], [-1]], r"names -1, and there are 2 boxes"),
    ([*TURN, "boxes_seq"], [[0], ["a"]], r"boxes_seq\[1\] holds 'a'; expected a number"),
    ([*TURN, "points_seq"], [[0]], r"points_seq has 1 entries, and the text holds 0 <points>"),
    ([*TURN, "value"], "<ph_st>A man<ph_ed>", r"holds <ph_st>, which a reader of the data set fills in"),
]


@pytest.mark.parametrize(("path", "value", "message"), BROKEN)
def test_broken_items_are_refused(path, value, message):
    with pytest.raises(DataError, match=message):
        read_item(changed(path, value))


def test_what_is_no_item():
    with pytest.raises(DataError, match="expected an object such as"):
        read_item([])
    answer_first = {"conversations": [{"from": "gpt", "value": "Hi."}]}
    with pytest.raises(DataError, match=r'from is "gpt"; expected "human", which asks first'):
        read_item(answer_first)
    several = {"image": ["a", "b"], "target": [{"boxes": [[0, 0, 9, 9]]}, {}], "conversations": [{}]}
    several["conversations"] = [{"from": "human", "value": "<boxes>", "boxes_seq": [[0]]}]
    with pytest.raises(DataError, match=r"holds 0; expected \[number of the image, number of its box or point\]"):
        read_item(several)
    several["conversations"][0]["boxes_seq"] = [[[2, 0]]]
    with pytest.raises(DataError, match=r"names \[2, 0\], and there are 2 images"):
        read_item(several)
