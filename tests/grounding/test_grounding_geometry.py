"""Geometry is tested by drawing: a filled rectangle is found again where `moved` says it lies."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mindspeed_mm.data.box_steps import image_steps, is_whole
from mindspeed_mm.data.config import PreprocessParameters
from mindspeed_mm.data.grounding.geometry import (
    CentreCrop,
    Crop,
    ExpandToSquare,
    Resize,
    ResizeShortest,
    final_size,
    fractions,
    moved,
)
from mindspeed_mm.data.image import ImageProcessor, preprocess
from mindspeed_mm.data.image_tiles import TiledImages
from mindspeed_mm.models.tiles import best_resolution, resized_size

SIZE, BOX = (120, 90), (36, 24, 84, 60)


def drawn(size=SIZE, box=BOX):
    image = Image.new("RGB", size, "black")
    ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill="white")
    return image


def found(pixels):
    """Box of what is bright, of a [height, width] array."""
    rows, columns = np.flatnonzero(pixels.max(1) > 127), np.flatnonzero(pixels.max(0) > 127)
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


@pytest.mark.parametrize(
    ("steps", "change"),
    [
        ((ExpandToSquare(),), lambda image: padded(image)),
        ((Resize(60, 180),), lambda image: image.resize((60, 180))),
        ((Crop(20, 10, 70, 60),), lambda image: image.crop((20, 10, 90, 70))),
        ((ExpandToSquare(), Resize(60, 60), Crop(0, 0, 60, 50)), lambda image: two(image)),
        ((ResizeShortest(45), CentreCrop(45, 45)), lambda image: image.resize((60, 45)).crop((7, 0, 52, 45))),
    ],
)
def test_boxes_move_with_the_image(steps, change):
    image = change(drawn())
    assert image.size == final_size(SIZE, steps)
    box = moved(BOX, SIZE, steps)
    assert np.abs(np.array(found(np.array(image)[..., 0])) - box).max() <= 1
    assert moved(BOX[:2], SIZE, steps) == box[:2]


def padded(image):
    side = max(image.size)
    result = Image.new("RGB", (side, side))
    result.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return result


def two(image):
    return padded(image).resize((60, 60)).crop((0, 0, 60, 50))


def test_fractions_are_cut_and_rounded():
    assert fractions((-5, 0, 66.66666, 120), 100, 100) == [0.0, 0.0, 0.667, 1.0]


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("size", [(130, 90), (61, 200)])
@pytest.mark.parametrize("as_folder", [True, False])
def test_steps_of_a_processor_are_what_its_pixels_show(tmp_path, pad, size, as_folder):
    fields = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    fields |= {"do_normalize": False}
    if as_folder:
        config = {"image_processor": fields | {"image_processor_type": "CLIPImageProcessor"}}
        (tmp_path / "processor_config.json").write_text(json.dumps(config))
    source = {"image_processer_path": str(tmp_path)} if as_folder else {"train_pipeline": fields}
    steps = image_steps(PreprocessParameters(**source, pad2square=pad))
    middle = (size[0] / 2, size[1] / 2)
    box = (middle[0] - 12, middle[1] - 9, middle[0] + 12, middle[1] + 9)
    # A black image is padded with the mean colour, which is below half.
    pixels = preprocess(drawn(size, box), ImageProcessor.from_config(fields), pad)
    assert np.abs(np.array(found(pixels[0].numpy() * 255)) - moved(box, size, steps)).max() <= 1.5
    assert final_size(size, steps) == (64, 64)


@pytest.mark.parametrize("size", [(120, 90), (90, 200)])
def test_boxes_move_with_the_tiles_of_an_image(size):
    """LLaVA-NeXT's: an image is resized, put in the middle of a canvas, and cut into tiles."""
    side, fields = 56, {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}, "do_normalize": False}
    tiles = TiledImages(fields, [[56, 112], [112, 56], [112, 112]], side=side, patches=4)
    box = (size[0] * 0.3, size[1] * 0.3, size[0] * 0.8, size[1] * 0.7)
    box = tuple(map(round, box))
    media = tiles.item(drawn(size, box))
    height, width = best_resolution(size[::-1], tiles.pinpoints)
    inner = resized_size(size[::-1], (height, width))[::-1]
    middle = Crop(-((width - inner[0]) // 2), -((height - inner[1]) // 2), width, height)
    pixels = media.pixels.reshape(-1, 3, side, side)[:, 0].numpy() * 255
    whole = moved(box, size, (Resize(side, side),))
    assert np.abs(np.array(found(pixels[0])) - whole).max() <= 1.5
    corners = [(left, top) for top in range(0, height, side) for left in range(0, width, side)]
    for tile, (left, top) in zip(pixels[1:], corners, strict=True):
        seen = np.clip(moved(box, size, (Resize(*inner), middle, Crop(left, top, side, side))), 0, side)
        if min(seen[2] - seen[0], seen[3] - seen[1]) > 4:
            assert np.abs(np.array(found(tile)) - seen).max() <= 1.5
    assert not is_whole(tiles)


def test_processors_of_tiles_have_no_steps():
    assert image_steps(PreprocessParameters(train_pipeline={"image_processor_type": "Qwen2VLImageProcessor"})) == ()
