"""Every public set once more: from its file to tokens and back, and its boxes drawn on the image."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from evaluation.drawing import ASKED, TRUE
from evaluation.predicted.page import render_predictions
from mindspeed_mm.data.expand import Encoding
from mindspeed_mm.data.grounding.geometry import CentreCrop, ExpandToSquare, ResizeShortest
from mindspeed_mm.data.grounding.notation import notation
from mindspeed_mm.data.image import ImageProcessor
from mindspeed_mm.data.media import FixedSizeImages
from mindspeed_mm.data.template import get_template
from mindspeed_mm.data.tokenizer import load_tokenizer
from tests.grounding.test_public_sets import BOX, BOX2, CASES, V7W, records
from tests.grounding.test_public_sets import folder as sets_folder  # noqa: F401 - a fixture
from tests.grounding.test_reasoned_sets import VCR

ALL = [case[:3] for case in CASES] + [("v7w_point", V7W, {}), ("vcr", VCR, {"version": "qa-r"})]
STEPS = (ExpandToSquare(), ResizeShortest(224), CentreCrop(224, 224))
STYLE = notation("square", 2)


@pytest.fixture(scope="module")
def encoding(golden):
    """LLaVA-1.5's tokens, an image as four of them."""
    media = FixedSizeImages(ImageProcessor.from_config({}), 4)
    return Encoding(load_tokenizer(golden / "tokenizer"), get_template("v1"), media, "text")


@pytest.mark.parametrize(("kind", "record", "settings"), ALL)
def test_boxes_survive_the_tokens_and_are_drawn_where_they_lie(sets_folder, encoding, kind, record, settings):  # noqa: F811
    sample = records(sets_folder, kind, [record], settings)[0]
    ids, labels = encoding.tokens(sample)
    learned = encoding.tokenizer.decode([label for label in labels if label >= 0])
    answer = sample.turns[-1].text
    assert STYLE.parse(learned) == STYLE.parse(answer) and STYLE.parse(learned, 2) == STYLE.parse(answer, 2)
    assert " ".join(learned.removesuffix("</s>").split()) == " ".join(answer.split())
    page = render_predictions("test", [sample], [""], {}, STYLE, STEPS)
    image = re.findall(r'base64,([^"]+)"', page)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image[0]))).convert("RGB")).astype(int)
    known = [[value * 224 / 200 for value in box] for box in (BOX, BOX2)]
    outer = [*np.min([box[:2] for box in known], axis=0), *np.max([box[2:] for box in known], axis=0)]
    # The answer's are drawn over the question's.
    drawn = [colour for text, colour in ((answer, TRUE), (sample.turns[-2].text, ASKED)) if STYLE.parse(text)]
    if drawn:
        seen = places(pixels, drawn[0])
        assert min(np.abs(np.subtract(seen, box)).max() for box in (*known, outer)) < 6


def places(pixels, colour):
    """Left, top, right and bottom of what has about this colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    rows, columns = np.nonzero(np.abs(pixels - wanted).sum(axis=-1) < 90)
    return columns.min(), rows.min(), columns.max(), rows.max()
