"""The page of a predicted set: boxes of every notation, drawn where they lie on the stored image."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from evaluation.drawing import ASKED, SAID, TRUE
from evaluation.predicted.answers import evaluation_request
from evaluation.predicted.metrics import set_metrics
from evaluation.predicted.page import found_entries, render_predictions, stored_place
from mindspeed_mm.data.grounding.geometry import CentreCrop, ExpandToSquare, Resize, ResizeShortest, fractions, moved
from mindspeed_mm.data.grounding.notation import NOTATIONS, notation
from mindspeed_mm.data.sample import Sample, Turn, VideoFrames
from mindspeed_mm.errors import DataError

SIZE, BOX = (200, 100), (40.0, 20.0, 120.0, 80.0)
PADDED = (ExpandToSquare(), ResizeShortest(56), CentreCrop(56, 56))


@pytest.fixture
def street(tmp_path):
    """An image whose middle is a yellow house."""
    image = Image.new("RGB", SIZE, "white")
    ImageDraw.Draw(image).rectangle(BOX, fill="yellow")
    image.save(tmp_path / "street.png")
    return str(tmp_path / "street.png")


def sample(path, *texts):
    roles = ("human", "gpt")
    turns = tuple(Turn(roles[number % 2], text) for number, text in enumerate(texts))
    return Sample("a", turns, (path,), "folder/items.jsonl: record 0")


def drawn(page):
    (found,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(found)))).astype(int)


def places(pixels, colour):
    """Left, top, right and bottom of what has about this colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    rows, columns = np.nonzero(np.abs(pixels - wanted).sum(axis=-1) < 90)
    return columns.min(), rows.min(), columns.max(), rows.max()


@pytest.mark.parametrize("steps", [(), PADDED, (Resize(448, 448),), (ResizeShortest(56), CentreCrop(56, 56))])
def test_places_come_back_to_the_stored_image(steps):
    box = (70.0, 20.0, 120.0, 80.0)  # inside of what a centre crop leaves
    size = (56, 56) if len(steps) > 1 else (448, 448) if steps else SIZE
    written = fractions(moved(box, SIZE, steps), *size, None)
    assert stored_place(written, SIZE, steps) == pytest.approx(box)
    assert stored_place(written[:2], SIZE, steps) == pytest.approx(box[:2])


@pytest.mark.parametrize("name", NOTATIONS)
def test_boxes_of_every_notation_are_drawn_where_they_lie(street, name):
    style = notation(name)
    written = style.format([fractions(moved(BOX, SIZE, PADDED), 56, 56)])
    other = style.format([[0.0, 0.25, 0.1, 0.5]])
    page = render_predictions("test", [sample(street, f"What is {other}?", written)], [written], {}, None, PADDED)
    pixels = drawn(page)
    scale = pixels.shape[1] / SIZE[0]
    expected = [value * scale for value in BOX]
    # What was said lies on the right answer, dash by dash; MiniGPT-v2's hundredths are cut off.
    assert np.abs(np.subtract(places(pixels, SAID), expected)).max() < 5
    left, top, right, bottom = places(pixels, ASKED)
    assert (left, right) == pytest.approx((0, 20 * scale), abs=3) and top < bottom < pixels.shape[0] / 2 + 3


def test_tasks_of_minigpt_v2(street):
    texts = {
        "[refer] the house": "{<20><20><60><80>}",
        "[identify] {<20><20><60><80>}": "a yellow house",
        "[grounding] all": "<p>house</p> {<20><20><60><80>}<delim>{<0><0><10><10>} on <p>grass</p> {<0><0><99><99>}",
    }
    for question, answer in texts.items():
        page = render_predictions(
            "test", [sample(street, question, answer)], ["no idea"], {"test_samples": 1}, None, ()
        )
        pixels, colour = drawn(page), ASKED if "identify" in question else TRUE
        assert places(pixels, colour)[2] > 0 and "record 0" in page and "no idea" in page
    assert found_entries(answer, None) == [[0.2, 0.2, 0.6, 0.8], [0.0, 0.0, 0.1, 0.1], [0.0, 0.0, 0.99, 0.99]]
    assert found_entries("at [0.500,0.250]", None) == [[0.5, 0.25]] and found_entries("nothing", None) == []


def test_texts_are_escaped_and_a_missing_image_is_told(street, tmp_path):
    page = render_predictions("test", [sample(street, "<b>x</b>", "&")], ["<script>"], {}, None, ())
    assert "&lt;b&gt;x" in page and "<script>\n" not in page.split("<tbody>")[1].split("</tbody>")[0]
    page = render_predictions("test", [sample(str(tmp_path / "no.png"), "x", "y")], ["z"], {}, None, ())
    assert "no.png is missing" in page and "<img" not in page


def test_metrics_of_sets():
    bins = notation("bins")
    right = bins.format([[0.0, 0.0, 0.5, 1.0]])
    found = set_metrics("rec", [right, "none", bins.format([[0.5, 0, 1, 1]])], [f"Answer: {right} ."] * 3, bins)
    assert found == {"accuracy": 1 / 3, "target_failed": 0, "failed": 1, "iou": 1 / 3}
    assert set_metrics("exact", ["So the answer is yes."], ["The answer is yes."])["accuracy"] == 1
    assert set_metrics("point_qa", ["The answer is 1.5."], ["The answer is 1.5."])["accuracy"] == 1
    captions = set_metrics("caption", ["a red box on a mat", "two dogs"], ["a red box on a mat", "a cat"])
    assert captions["bleu_1"] < 1 and captions["cider"] > 0
    assert set_metrics(None, ["a"], ["b"]) == {}
    said, wanted = ["at [ 0, .5, 1, 1 ]", "[0.000,0.500,1.000,1.000]"], ["[0.000,0.500,1.000,1.000]"] * 2
    assert set_metrics("rec", said, wanted)["failed"] == 1
    lenient = set_metrics("rec", said, wanted, lenient=True)
    assert (lenient["accuracy"], lenient["failed"], lenient["lenient"]) == (1, 0, 1)


def test_records_that_are_not_asked():
    turns = (Turn("human", "<image> and <image>", literal=(0,)), Turn("gpt", "x"))
    with pytest.raises(DataError, match="record 0: a text holds an <image> that is none"):
        evaluation_request(0, Sample("a", turns, (), "a.jsonl: record 0"))
    with pytest.raises(DataError, match="record 0: the record shows frames of a video"):
        evaluation_request(0, Sample("a", turns, (VideoFrames(("a.png",)),), "a.jsonl: record 0"))
