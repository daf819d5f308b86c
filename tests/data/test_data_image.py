"""Preprocessing equals transformers 4's slow CLIPImageProcessor behind LLaVA's process_images."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mindspeed_mm.data import image as image_module
from mindspeed_mm.data.image import PROCESSOR_TYPES, ImageProcessor, load_image, preprocess
from mindspeed_mm.data.sample import ImageBytes, ImageMember
from mindspeed_mm.errors import ConfigError, DataError

TOLERANCE = 2e-6


def clip(size: int, **changes) -> ImageProcessor:
    return ImageProcessor.from_config({"size": {"shortest_edge": size}, "crop_size": size} | changes)


@pytest.fixture(scope="module")
def expected(golden):
    from safetensors.torch import load_file

    return load_file(golden / "images/preprocessed.safetensors")


@pytest.mark.parametrize("name", ["cmyk", "gray", "landscape", "palette", "portrait", "tiny"])
def test_golden_images(golden, expected, name):
    entry = json.loads((golden / "images/preprocessed_meta.json").read_text())["images"][name]
    path = golden / "images" / entry["file"]
    decoded = hashlib.sha256(np.asarray(load_image(path)).tobytes()).hexdigest()
    tolerance = TOLERANCE if decoded == entry["decoded_sha256"] else 0.03  # another JPEG decoder
    processor = ImageProcessor.from_config(golden / "models/clip_hf")
    assert processor == ImageProcessor.from_config(golden / "models/llava_hf/preprocessor_config.json")
    for mode in ("pad", "square"):
        pixels = preprocess(path, processor, pad=mode == "pad")
        assert pixels.dtype == torch.float32 and pixels.is_contiguous()
        torch.testing.assert_close(pixels, expected[f"{name}.{mode}"], rtol=0, atol=tolerance)
        large = preprocess(path, clip(336), pad=mode == "pad")
        points = entry[f"{mode}_336"]
        found = torch.stack([large[tuple(place)] for place in points["points_chw"]])
        torch.testing.assert_close(found, torch.tensor(points["values"]), rtol=0, atol=tolerance)
        mean, std = torch.tensor(points["mean_per_channel"]), torch.tensor(points["std_per_channel"])
        torch.testing.assert_close(large.mean((1, 2)), mean, rtol=0, atol=1e-4)
        torch.testing.assert_close(large.std((1, 2), correction=0), std, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("size", [(9, 1), (1, 9), (7, 3), (1, 1), (3, 3)])
def test_thin_images_keep_their_channels(size, pad):
    """transformers guesses the channel axis from the shape and errs on these."""
    image = Image.new("RGB", size, (255, 0, 0))
    pixels = preprocess(image, clip(4, do_normalize=False), pad=pad)
    assert pixels.shape == (3, 4, 4)
    middle = pixels[:, 2, 2] if pad else pixels[:, 0, 0]
    assert middle[0] > middle[1] and middle[0] > middle[2]
    if not pad:
        assert torch.equal(pixels, torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 4, 4))


def test_flags():
    image = Image.new("RGB", (6, 4), (10, 20, 30))
    kept = preprocess(image, clip(4, do_resize=False, do_rescale=False, do_normalize=False), pad=False)
    assert kept.shape == (3, 4, 4) and kept[:, 0, 0].tolist() == [10, 20, 30]
    whole = ImageProcessor.from_config({"size": {"height": 2, "width": 5}, "do_center_crop": False})
    assert preprocess(image, whole, pad=False).shape == (3, 2, 5) and whole.output_size == (2, 5)
    assert ImageProcessor.from_config({"do_center_crop": False}).output_size is None
    bordered = preprocess(image, clip(8, do_resize=False, do_rescale=False, do_normalize=False), pad=False)
    assert bordered.shape == (3, 8, 8) and int((bordered[0] > 0).sum()) == 24
    assert bordered[0, 2:6, 1:7].min() == 10


def test_a_square_image_is_not_padded_and_others_get_the_mean_colour():
    processor = clip(8, do_rescale=False, do_normalize=False, do_resize=False)
    pixels = preprocess(Image.new("RGB", (8, 4), "black"), processor)
    assert pixels[:, 0, 0].tolist() == [122, 116, 104] and pixels[:, 2, 0].tolist() == [0, 0, 0]


def test_save_and_load(tmp_path):
    processor = clip(14, image_mean=[0.5, 0.5, 0.5])
    processor.save(tmp_path)
    assert ImageProcessor.from_config(tmp_path) == processor
    image = Image.new("RGB", (30, 20), "red")
    assert torch.equal(preprocess(image, tmp_path), preprocess(image, processor))


def test_a_nested_processor_config(tmp_path):
    content = {"image_processor": {"size": 30, "image_processor_type": "CLIPImageProcessor"}, "processor_class": "L"}
    (tmp_path / "processor_config.json").write_text(json.dumps(content))
    assert ImageProcessor.from_config(tmp_path).size == {"shortest_edge": 30}


@pytest.mark.parametrize("kind", PROCESSOR_TYPES)
def test_processors_of_stock_exports(kind):
    square = {"default_to_square": True, "size": {"height": 8, "width": 8}}  # asks for nothing: size says it all
    assert ImageProcessor.from_config(square).size == square["size"]
    fast = {"data_format": "channels_first", "default_to_square": False, "device": None, "do_pad": None}
    size = {"height": 30, "width": 30} if kind.startswith(("Siglip", "ViT", "Blip")) else {"shortest_edge": 30}
    fields = {"image_processor_type": kind, "size": size, "crop_size": 30}
    assert ImageProcessor.from_config(fields | fast).output_size == (30, 30)


@pytest.mark.parametrize(
    "kind", ["ViTImageProcessor", "BlipImageProcessor", "CLIPImageProcessor", "ViTFeatureExtractor"]
)
def test_letter_b_one_number_as_the_size_means_what_it_means_in_transformers(kind):
    """A square or the shortest edge, by the kind of processor; google/vit-base-patch16-224 has "size": 224."""
    import transformers

    theirs = getattr(transformers, f"{kind.replace('FeatureExtractor', 'ImageProcessor')}Pil")(size=30).size
    wanted = {key: theirs[key] for key in ("height", "width", "shortest_edge") if theirs.get(key)}
    key = "feature_extractor_type" if kind.endswith("Extractor") else "image_processor_type"
    assert ImageProcessor.from_config({key: kind, "size": 30}).size == wanted


def test_llavas_own_processor_pads(tmp_path):
    fields = {"image_processor_type": "LlavaImageProcessor", "size": 30, "crop_size": 30, "do_pad": True}
    processor = ImageProcessor.from_config(fields)
    image = Image.effect_noise((40, 20), 50).convert("RGB")
    plain = ImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
    assert torch.equal(preprocess(image, processor, pad=False), preprocess(image, plain, pad=True))
    processor.save(tmp_path)
    assert ImageProcessor.from_config(tmp_path) == processor
    plain.save(tmp_path)
    assert "do_pad" not in (tmp_path / "preprocessor_config.json").read_text()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data_format": "channels_last"}, "data_format is 'channels_last'; expected 'channels_first'"),
        ({"default_to_square": True}, "default_to_square is True; expected False"),
        (
            {"image_processor_type": "ConvNextImageProcessor"},
            'image_processor_type is "ConvNextImageProcessor"; expected',
        ),
        ({"sise": 3}, 'sise: unknown key; did you mean "size"'),
        ({"size": {"longest_edge": 3}}, "size has the keys"),
        ({"crop_size": {"shortest_edge": 3}}, "crop_size has the keys"),
        ({"size": 0}, "greater than 0"),
        ({"image_std": [1.0, 0.0, 1.0]}, "expected positive numbers"),
        ({"resample": "bicubic"}, "resample: found"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        ImageProcessor.from_config(fields)


def test_missing_config(tmp_path):
    with pytest.raises(ConfigError, match="holds no preprocessor_config.json"):
        ImageProcessor.from_config(tmp_path)


def test_bad_files(tmp_path, image_folder):
    with pytest.raises(DataError, match="image .*none.png is missing"):
        load_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "zero.png").write_bytes(b"")
    for empty in (tmp_path / "zero.png", ImageBytes("zero", b""), ImageMember("zero", tmp_path / "text.png", 3, 0)):
        with pytest.raises(DataError, match=r"image .*zero.* is empty \(0 bytes\); expected a whole JPEG"):
            load_image(empty)
    with pytest.raises(DataError, match="image .*text.png cannot be decoded"):
        load_image(tmp_path / "text.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:600])
    with pytest.raises(DataError, match="image .*cut.png cannot be decoded"):
        load_image(tmp_path / "cut.png")
    with pytest.raises(DataError, match="is a folder, a pipe or a device"):
        load_image(tmp_path)


def test_too_many_pixels(tmp_path, monkeypatch):
    Image.new("RGB", (30, 2)).save(tmp_path / "wide.png")
    monkeypatch.setattr(image_module, "MAX_PIXELS", 50)
    with pytest.raises(DataError, match="wide.png is 30 x 2 pixels; at most 50 are decoded"):
        load_image(tmp_path / "wide.png")
    monkeypatch.setattr(image_module, "MAX_PIXELS", 100)
    with pytest.raises(DataError, match="is 30 x 2, 900 pixels when padded to a square"):
        preprocess(tmp_path / "wide.png", clip(4))
    with pytest.raises(DataError, match="is 30 x 2, 240 pixels when resized"):
        preprocess(tmp_path / "wide.png", clip(4), pad=False)
    with pytest.raises(DataError, match="has no pixels"):
        preprocess(Image.new("RGB", (0, 3)), clip(4))


def test_transparency_is_dropped():
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    pixels = preprocess(image, clip(4, do_rescale=False, do_normalize=False))
    assert pixels[:, 0, 0].tolist() == [200, 100, 50]


def test_fast_resizing_differs_by_one_level_at_most(golden):
    processor = ImageProcessor.from_config(golden / "models" / "clip_hf")
    for path in sorted((golden / "images" / "src").iterdir()):
        for pad in (True, False):
            faithful = preprocess(path, processor, pad)
            fast = preprocess(path, processor, pad, fast=True)
            level = torch.tensor([1 / 255 / std for std in processor.image_std])[:, None, None]
            levels = ((fast - faithful) / level).abs()
            assert levels.max() < 1.01 and (levels > 0.5).float().mean() < 0.05
