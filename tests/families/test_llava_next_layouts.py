"""LLaVA-NeXT: the original and our own layout, and input that does not fit."""

import json

import pytest
import torch
import transformers

import mindspeed_mm as mm
from mindspeed_mm.data.image import ImageError
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models.describe import describe_model
from mindspeed_mm.models.media import Media
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import find_family, load_model_spec
from tests.helpers.tiny_llava import (
    IMAGE_ID,
    PINPOINTS,
    SIZES,
    clip,
    close,
    image,
    inputs,
    llava,
    llava_next,
    sample,
    save,
    save_original,
    tile_processor,
)

FAMILY = find_family("llava_next")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(transformers' model, its folder, our spec)."""
    theirs = llava_next(clip())
    folder = save(theirs, tmp_path_factory.mktemp("base"), tile_processor())
    return theirs, folder, describe_model(open_source(folder))


@pytest.fixture(scope="module")
def original(base, tmp_path_factory):
    return save_original(base[0], tmp_path_factory.mktemp("original"))


def test_the_original_layout_is_the_same_model(base, original):
    theirs, folder, _ = base
    hub, ours = mm.load(folder, device="cpu"), mm.load(original, device="cpu")
    assert ours.spec.vision_projector.image_grid_pinpoints == PINPOINTS
    shown = [image(20, 60), image(60, 20)]
    own = inputs(FAMILY, ours.spec, sample(ours.media, shown, (5, 6, 7)))
    for key, value in inputs(FAMILY, hub.spec, sample(hub.media, shown, (5, 6, 7))).items():
        assert torch.equal(own[key], value)
    ids = own["input_ids"].masked_fill(own["input_ids"] == IMAGE_ID, -200)
    with torch.no_grad():
        close(ours.logits(**(own | {"input_ids": ids})), theirs(**own).logits)


def test_layouts_become_one_another(base, original, tmp_path):
    theirs, folder, spec = base
    mm.convert(original, tmp_path / "hf", to="llava_next")
    again, report = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert again.config.image_grid_pinpoints == PINPOINTS
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    answer = processor(text="w5 <image> w6", images=image(20, 60), return_tensors="pt")
    with torch.no_grad():
        close(again.eval()(**answer).logits[..., :IMAGE_ID], theirs(**answer).logits[..., :IMAGE_ID], 0)
    mm.convert(folder, tmp_path / "back", to="llava")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["image_grid_pinpoints"] == [[width, height] for height, width in PINPOINTS]
    assert (config["image_aspect_ratio"], config["mm_patch_merge_type"]) == ("anyres", "spatial_unpad")
    ours, wanted = (open_source(path) for path in (tmp_path / "back", original))
    for slot in ("text_decoder", "vision_encoder", "vision_projector"):
        found, expected = ours.part(slot), wanted.part(slot)
        assert set(found.names) == set(expected.names)
        assert all(torch.equal(found.get(name)[:IMAGE_ID], expected.get(name)[:IMAGE_ID]) for name in found.names)


def test_our_own_layout_round_trip(base, tmp_path):
    theirs, folder, _ = base
    mm.convert(folder, tmp_path / "ours", to="mindspeed-mm")
    vlm = mm.load(tmp_path / "ours", device="cpu")
    assert vlm.spec.model_id == "llava_next"
    own = inputs(FAMILY, vlm.spec, sample(vlm.media, [image(30, 50)], (5, 6)))
    ids = own["input_ids"].masked_fill(own["input_ids"] == IMAGE_ID, -200)
    with torch.no_grad():
        close(vlm.logits(**(own | {"input_ids": ids})), theirs(**own).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_patch_merge_type": "flat"}, "a tensor model.image_newline with mm_patch_merge_type spatial_unpad alone"),
        (
            {"mm_patch_merge_type": "maxpool2x2"},
            "with mm_patch_merge_type 'maxpool2x2'; expected anyres with spatial_unpad, spatial, flat",
        ),
        ({"image_aspect_ratio": "anyres_max_9"}, "found image_aspect_ratio 'anyres_max_9'"),
        ({"image_aspect_ratio": "pad"}, "found image_aspect_ratio 'pad' with mm_patch_merge_type 'spatial_unpad'"),
        ({"mm_use_im_start_end": True}, "found mm_use_im_start_end true with tiles of LLaVA-1.6"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "found image_grid_pinpoints .*expected pairs of pixels"),
        ({"image_grid_pinpoints": [[28, 56], [30, 56]]}, r"found \[56, 30\], expected multiples of .* image_size 28"),
        (
            {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"},
            "tiles go with image_aspect_ratio anyres, and a tensor model.image_newline",
        ),
        ({"mm_vision_select_feature": "cls_patch"}, "a class token has no place"),
    ],
)
def test_other_original_models_are_refused(base, tmp_path, changes, message):
    with pytest.raises((ConfigError, WeightError), match=message):
        mm.load(save_original(base[0], tmp_path, **changes), device="cpu")


def test_pinpoints_as_text_are_read(base, tmp_path):
    folder = save_original(base[0], tmp_path, image_grid_pinpoints="[(56, 28), (28, 56)]")
    assert describe_model(open_source(folder)).vision_projector.image_grid_pinpoints == [[28, 56], [56, 28]]


def test_weights_without_newline_have_no_place_for_it(base, tmp_path):
    """Case: a checkpoint whose config.json asks for the newline vector of LLaVA-1.6 was read as if it did not."""
    folder = save_original(base[0], tmp_path, newline=False)
    with pytest.raises(ConfigError, match="a tensor model.image_newline with mm_patch_merge_type spatial_unpad alone"):
        mm.load(folder, device="cpu")


def test_tiles_of_an_original_model_need_their_sizes(base, tmp_path):
    """The original code has no default of image_grid_pinpoints; transformers' default is another model's."""
    folder = save_original(base[0], tmp_path, mm_patch_merge_type="flat", newline=False, image_grid_pinpoints=None)
    with pytest.raises(ConfigError, match="found image_grid_pinpoints 'None'; expected pairs of pixels"):
        mm.load(folder, device="cpu")


def test_another_model_type_is_not_read_by_its_tensors(base, tmp_path):
    theirs, folder, _ = base
    save(theirs, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llava_onevision"}))
    with pytest.raises(ConfigError, match='found model_type "llava_onevision" .*; expected llava_next'):
        mm.load(tmp_path, device="cpu")


# --- Bad input -----------------------------------------------------------------------------------------------------


def test_processors_that_do_not_fit_are_refused(base):
    _, _, spec = base

    def refused(config, message, **options):
        with pytest.raises(ConfigError, match=message):
            FAMILY.media_processor(spec, config, **options)

    refused(
        tile_processor(pinpoints=[[28, 56]]).to_dict(), r"has image_grid_pinpoints \[\[28, 56\]\], the model \[\[28"
    )
    refused(tile_processor(side=14).to_dict(), "shortest_edge 14, crop height 14, crop width 14; .* tiles of 28 x 28")
    refused({"image_processor_type": "Qwen2VLImageProcessor"}, 'image_processor_type is "Qwen2VLImageProcessor"')
    refused({"image_processor_type": "LlavaImageProcessor", "do_pad": True}, "pads images to squares")
    refused(tile_processor().to_dict() | {"image_grid_pinpoints": [3]}, "expected pairs of pixels")
    refused(tile_processor().to_dict(), "pads none to a square: set pad2square false", pad=True)


def test_inputs_that_do_not_fit_are_refused(base):
    _, _, spec = base
    given = tile_processor()([image(30, 50)], return_tensors="pt")
    with pytest.raises(ConfigError, match="takes pixel_values and image_sizes together"):
        FAMILY.media_of_inputs(spec, {"pixel_values": given["pixel_values"]})
    with pytest.raises(
        ConfigError, match=r"have shape \[1, 2, 3, 28, 28\]; expected \[images, tiles, 3, 28, 28\] with"
    ):
        FAMILY.media_of_inputs(spec, dict(given) | {"pixel_values": given["pixel_values"][:, :2]})
    with pytest.raises(
        ConfigError, match="takes the inputs pixel_values, image_sizes, mm_token_type_ids; found image_grid_thw"
    ):
        FAMILY.media_of_inputs(spec, {"image_grid_thw": torch.ones(1, 3)})
    assert FAMILY.media_of_inputs(spec, {}) is None


def test_an_image_without_pixels_is_refused(base):
    media = FAMILY.media_processor(base[2], tile_processor().to_dict())
    from PIL import Image

    with pytest.raises(ImageError, match="has no pixels"):
        media.item(Image.new("RGB", (0, 5)))


def test_features_that_are_no_grid_are_refused(base):
    from mindspeed_mm.errors import DataError
    from mindspeed_mm.models.kit.llava_next import _places

    with pytest.raises(DataError, match="an image of 3 tiles has 48 features; expected 2 x 2 tiles"):
        _places(48, 3, (20, 20), (2, 2), 0, 48)


def test_parts_that_do_not_fit_are_refused(base):
    from mindspeed_mm.models.spec import model_block

    _, _, spec = base
    model = model_block(spec.part_specs(), "llava_next")

    def refused(message, slot, **changes):
        inner = {**model["image_encoder"], slot: {**model["image_encoder"][slot], **changes}}
        with pytest.raises(ConfigError, match=message):
            load_model_spec({**model, "image_encoder": inner})

    refused("image_grid_pinpoints: found .*, expected multiples", "vision_projector", image_grid_pinpoints=[[28, 57]])
    refused("expected the vision_encoder's hidden_size|expected 32", "vision_projector", input_size=31)
    refused("at least 1 item|image_grid_pinpoints", "vision_projector", image_grid_pinpoints=[])
    short = {**model, "text_decoder": {**model["text_decoder"], "language_max_sequence_length": 60}}
    with pytest.raises(ConfigError, match="expected more than 88, the tokens of an image of the largest"):
        load_model_spec(short)
    plain = {key: value for key, value in model["image_encoder"]["vision_projector"].items()}
    plain = {key: value for key, value in plain.items() if key not in ("model_id", "image_grid_pinpoints")}
    with pytest.raises(ConfigError, match='found "mlp", expected "llava_next", the projector of model_id llava_next'):
        load_model_spec({**model, "image_encoder": {**model["image_encoder"], "vision_projector": plain}})


def test_llava_needs_its_start_and_end_token(base, tmp_path):
    """Case: LLaVA v1.0's <im_start> and <im_end> were left out without a word."""
    folder = save_original(base[0], tmp_path, image_aspect_ratio="pad", mm_patch_merge_type="flat", newline=False)
    assert mm.load(folder, device="cpu").spec.model_id == "llava"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mm_use_im_start_end": True}))
    with pytest.raises(
        ConfigError, match="found mm_use_im_start_end true, and no <im_start> and no <im_end> in the vocabulary"
    ):
        mm.load(folder, device="cpu")


def test_joined_media_keep_their_tiles(base):
    media = FAMILY.media_processor(base[2], tile_processor().to_dict())
    items = [media.item(image(*size)) for size in SIZES]
    joined = Media.join(items)
    assert joined.rows == tuple(item.rows[0] for item in items) and len(joined.pixels) == sum(joined.rows)
    assert llava(clip()).config.model_type == "llava"
