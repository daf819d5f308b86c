"""LLaVA-NeXT against transformers' classes: pixels, counts, logits, gradients, text, training and both layouts."""

import json

import pytest
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import mindspeed_mm as mm
from mindspeed_mm.data.image import ImageError
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models.describe import describe_model
from mindspeed_mm.models.families.llava_next import LLAVA_NEXT_HF
from mindspeed_mm.models.media import Media
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import find_family, load_model_spec
from tests.helpers.golden_training import GoldenLayout
from tests.helpers.tiny_llava import (
    FULL,
    IMAGE_ID,
    PINPOINTS,
    clip,
    image,
    inputs,
    llava,
    llava_next,
    sample,
    save,
    save_original,
    siglip,
    text,
    their_loss,
    tile_processor,
    words,
)
from tests.helpers.vlm_ranks import ADAM, GRADIENT, STEP, compare, stored, train, trained

VARIANTS = {
    "clip": (clip, {}),
    "clip layer 1": (clip, {"vision_feature_layer": 1}),
    "siglip": (siglip, FULL),
    "siglip with rest": (lambda: siglip(image_size=30), FULL | {"image_grid_pinpoints": [[30, 60], [90, 30]]}),
    "tied": (clip, {"text": {"tie_word_embeddings": True}, "tie_word_embeddings": True}),
}
FAMILY = find_family("llava_next")


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """(transformers' model, ours, transformers' processor, the folder)."""
    vision, changes = VARIANTS[request.param]
    theirs = llava_next(vision(), **changes)
    processor = tile_processor(theirs.config.vision_config.image_size, theirs.config.image_grid_pinpoints)
    folder = save(theirs, tmp_path_factory.mktemp("next"), processor)
    return theirs, mm.load(folder, device="cpu"), processor, folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(transformers' model, its folder, our spec)."""
    theirs = llava_next(clip())
    folder = save(theirs, tmp_path_factory.mktemp("base"), tile_processor())
    return theirs, folder, describe_model(open_source(folder))


def close(found, wanted, tolerance=2e-4):
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)


SIZES = ((30, 50), (90, 20), (1, 1), (40, 41))


def test_logits(pair):
    theirs, ours, processor, _ = pair
    shown = [image(*size) for size in SIZES]
    given = processor(shown, return_tensors="pt")
    encoded = sample(ours.media, shown, (7, 3, 1, 4, 5))
    wanted = inputs(FAMILY, ours.spec, encoded)
    for key, value in given.items():
        torch.testing.assert_close(wanted[key], value, atol=0, rtol=0)
    with torch.no_grad():
        close(ours.logits(wanted["input_ids"], None, **given), theirs(**wanted).logits)
        flat = FAMILY.media_of_inputs(ours.spec, dict(given)).pixels  # tiles of all images, one behind the other
        close(
            ours.logits(wanted["input_ids"], pixel_values=flat, image_sizes=given["image_sizes"]),
            theirs(**wanted).logits,
        )


def test_greedy_text(pair):
    theirs, ours, _, _ = pair
    shown = [image(30, 50), image(90, 20)]
    rows = [sample(ours.media, shown[:count], (5,) * (count + 1), seed=count) for count in (2, 1, 0)]
    wanted = []
    for row in rows:
        given = inputs(FAMILY, ours.spec, row)
        mask = torch.ones_like(given["input_ids"])
        options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        answer = theirs.generate(**given, attention_mask=mask, **options)
        wanted.append(answer[0, mask.shape[1] :].tolist())
    found = [
        ours.generate(input_ids=row.input_ids, images=shown[:count], max_new_tokens=9, eos_token_id=-1)[0]
        for row, count in zip(rows, (2, 1, 0), strict=True)
    ]
    assert found == wanted
    ragged = [row.input_ids for row in rows]
    assert ours.generate(input_ids=ragged, images=[*shown, shown[0]], max_new_tokens=9, eos_token_id=-1) == wanted


def test_a_placeholder_becomes_as_many_tokens_as_the_image_has_features(pair):
    _, ours, _, _ = pair
    row = sample(ours.media, [image(90, 20)], (5, 6))
    short = [*text(5, 0), IMAGE_ID, *text(6, 1)]
    found = [
        ours.generate(input_ids=ids, images=[image(90, 20)], max_new_tokens=4, eos_token_id=-1)
        for ids in (short, row.input_ids)
    ]
    assert found[0] == found[1]


def test_export_is_read_by_transformers(pair, tmp_path):
    theirs, ours, _, folder = pair
    mm.convert(folder, tmp_path / "out", to="llava_next")
    again, report = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    own = inputs(FAMILY, ours.spec, sample(ours.media, [image(30, 50)], (5, 6)))
    with torch.no_grad():
        close(again.eval()(**own).logits, theirs(**own).logits, 0)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    answer = processor(text="w5 <image> w6", images=image(30, 50), return_tensors="pt")
    assert (answer["input_ids"] == IMAGE_ID).sum() == ours.media.plan(30, 50).count
    torch.testing.assert_close(answer["pixel_values"], own["pixel_values"], atol=0, rtol=0)


# --- Any grid and size ---------------------------------------------------------------------------------------------

GRIDS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=5)
LENGTHS = st.one_of(st.integers(1, 90), st.sampled_from([1, 2, 700]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(grids=GRIDS, height=LENGTHS, width=LENGTHS, patch=st.sampled_from([7, 9, 14]))
@example(grids=[(1, 1)], height=1, width=1, patch=14)
@example(grids=[(2, 2)], height=1, width=700, patch=7)
@example(grids=[(4, 1), (1, 4)], height=700, width=1, patch=14)
@example(grids=[(1, 3), (3, 1)], height=30, width=30, patch=7)
def test_pixels_and_counts_follow_from_the_size(base, grids, height, width, patch):
    """Against the image processor, the processor that counts tokens, and the model that packs features."""
    theirs, _, spec = base
    pinpoints = [[28 * rows, 28 * columns] for rows, columns in grids]
    encoder = spec.vision_encoder.model_copy(update={"patch_size": patch})
    projector = spec.vision_projector.model_copy(update={"image_grid_pinpoints": pinpoints})
    inner = spec.image_encoder.model_copy(update={"vision_encoder": encoder, "vision_projector": projector})
    own = spec.model_copy(update={"image_encoder": inner})
    processor = tile_processor(28, pinpoints)
    media = FAMILY.media_processor(own, processor.to_dict())
    shown = image(height, width)
    item, plan = media.item(shown), media.plan(height, width)
    found, wanted = FAMILY.inputs_of_media(own, item), processor([shown], return_tensors="pt")
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=0, rtol=0)
    whole = transformers.LlavaNextProcessor(
        processor,
        words(),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    assert (whole(text="<image>", images=shown)["input_ids"][0].count(IMAGE_ID)) == plan.count
    assert item.grid.tolist() == [list(plan.grid)] and item.sizes.tolist() == [[height, width]]
    patches = 28 // patch
    config = theirs.config.__class__(
        text_config=theirs.config.text_config,
        vision_config=clip(patch_size=patch),
        image_grid_pinpoints=pinpoints,
    )
    old, theirs.model.config = theirs.model.config, config
    try:
        features = torch.randn(item.rows[0], patches**2, 48)
        newline = theirs.model.image_newline
        packed, _ = theirs.model.pack_image_features([features], wanted["image_sizes"], "default", newline)
    finally:
        theirs.model.config = old
    assert len(packed[0]) == plan.count
    from mindspeed_mm.models.kit.llava_next import _places

    places = _places(features.shape[0] * patches**2, item.rows[0], (height, width), plan.grid[1:], 0, -1)
    ours = torch.cat((features.flatten(0, 1), newline[None]))[places]
    torch.testing.assert_close(ours, packed[0], atol=0, rtol=0)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    heads=st.integers(1, 3),
    channels=st.sampled_from([4, 6, 10]),
    side=st.sampled_from([14, 20, 35]),
    grids=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3, unique=True),
    size=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    kind=st.sampled_from([clip, siglip]),
)
def test_logits_of_any_geometry(tmp_path_factory, heads, channels, side, grids, size, kind):
    vision = {
        "hidden_size": heads * channels,
        "num_attention_heads": heads,
        "image_size": side,
        "patch_size": side // 2,
    }
    pinpoints = [[side * rows, side * columns] for rows, columns in grids]
    theirs = llava_next(
        kind(**vision), image_grid_pinpoints=pinpoints, **(FULL if kind is siglip else {"vision_feature_layer": -1})
    )
    ours = mm.load(save(theirs, tmp_path_factory.mktemp("any"), tile_processor(side, pinpoints)), device="cpu")
    own = inputs(FAMILY, ours.spec, sample(ours.media, [image(*size)], (5, 6)))
    with torch.no_grad():
        close(ours.logits(**own), theirs(**own).logits)


# --- Training ------------------------------------------------------------------------------------------------------


def samples_of(spec):
    """Three samples: two images, none, one."""
    media = FAMILY.media_processor(spec, tile_processor().to_dict())
    return [
        sample(media, [image(30, 50), image(90, 20)], (6, 9, 5), seed=1),
        sample(media, [], (23,), seed=5),
        sample(media, [image(1, 7)], (4, 12), seed=9),
    ]


LAYOUTS = {
    "one rank": GoldenLayout(),
    "packed": GoldenLayout(packed=True),
    "TP2": GoldenLayout(tensor=2),
    "TP2 SP packed": GoldenLayout(tensor=2, flags="--sequence-parallel", packed=True),
    "PP2": GoldenLayout(pipeline=2),
    "CP2": GoldenLayout(context=2),
    "CP2 packed": GoldenLayout(context=2, packed=True),
    "TP2 PP2": GoldenLayout(tensor=2, pipeline=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients(base, ranks, name, tmp_path):
    theirs, folder, spec = base
    samples = samples_of(spec)
    theirs.zero_grad()
    their_loss(theirs, FAMILY, spec, samples).backward()
    wanted = {name: tensor.grad for name, tensor in stored(theirs, LLAVA_NEXT_HF).items() if tensor.grad is not None}
    layout = LAYOUTS[name]
    ranks(layout.ranks).run(train, str(folder), layout, samples, str(tmp_path), 1, GRADIENT)
    before = {key: tensor.detach() for key, tensor in stored(theirs, LLAVA_NEXT_HF).items()}
    after = trained(tmp_path, spec, LLAVA_NEXT_HF)
    compare({key: (before[key] - tensor[: len(before[key])]) / STEP for key, tensor in after.items()}, wanted)
    assert wanted["image_newline"].norm() > 0


@pytest.mark.parametrize("name", ["one rank", "TP2 PP2"])
def test_five_steps(base, ranks, name, tmp_path):
    _, folder, spec = base
    theirs = transformers.LlavaNextForConditionalGeneration.from_pretrained(folder)
    samples = samples_of(spec)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(5):
        optimizer.zero_grad()
        their_loss(theirs, FAMILY, spec, samples).backward()
        optimizer.step()
    layout = LAYOUTS[name]
    ranks(layout.ranks).run(train, str(folder), layout, samples, str(tmp_path), 5, ADAM)
    compare(trained(tmp_path, spec, LLAVA_NEXT_HF), stored(theirs, LLAVA_NEXT_HF))


# --- The original layout -------------------------------------------------------------------------------------------


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
        (
            {"mm_patch_merge_type": "flat"},
            "anyres' with mm_patch_merge_type 'flat'; expected anyres with spatial_unpad",
        ),
        ({"image_aspect_ratio": "anyres_max_9"}, "found image_aspect_ratio 'anyres_max_9'"),
        ({"image_aspect_ratio": "pad"}, "found image_aspect_ratio 'pad' with mm_patch_merge_type 'spatial_unpad'"),
        ({"mm_use_im_start_end": True}, "found mm_use_im_start_end true: such a model .LLaVA v1.0."),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "found image_grid_pinpoints .*expected pairs of pixels"),
        ({"image_grid_pinpoints": [[28, 56], [30, 56]]}, r"found \[56, 30\], expected multiples of .* image_size 28"),
        (
            {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"},
            "tiles go with image_aspect_ratio anyres, mm_patch_merge_type spatial_unpad",
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


@pytest.mark.parametrize("changes", [{"image_aspect_ratio": "anyres"}, {"mm_patch_merge_type": "spatial"}])
def test_weights_without_newline_are_no_llava_of_tiles(base, tmp_path, changes):
    """Case: a LLaVA-1.5 checkpoint whose config.json asks for tiles was read as if it did not."""
    folder = save_original(base[0], tmp_path, **({"mm_patch_merge_type": "flat"} | changes))
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.image_newline"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="tiles go with image_aspect_ratio anyres"):
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
    with pytest.raises(ConfigError, match="takes the inputs pixel_values, image_sizes; found image_grid_thw"):
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
    short = {**model, "text_decoder": {**model["text_decoder"], "max_position_embeddings": 60}}
    with pytest.raises(ConfigError, match="expected more than 88, the tokens of an image of the largest"):
        load_model_spec(short)
    plain = {key: value for key, value in model["image_encoder"]["vision_projector"].items()}
    plain = {key: value for key, value in plain.items() if key not in ("model_id", "image_grid_pinpoints")}
    with pytest.raises(ConfigError, match='found "mlp", expected "llava_next", the projector of model_id llava_next'):
        load_model_spec({**model, "image_encoder": {**model["image_encoder"], "vision_projector": plain}})


def test_llava_refuses_a_start_and_an_end_token(base, tmp_path):
    """Case: LLaVA v1.0's <im_start> and <im_end> were left out without a word."""
    from safetensors.torch import load_file, save_file

    folder = save_original(base[0], tmp_path, image_aspect_ratio="pad", mm_patch_merge_type="flat")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.image_newline"]
    save_file(tensors, folder / "model.safetensors")
    assert mm.load(folder, device="cpu").spec.model_id == "llava"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mm_use_im_start_end": True}))
    with pytest.raises(ConfigError, match="found mm_use_im_start_end true: such a model"):
        mm.load(folder, device="cpu")


def test_joined_media_keep_their_tiles(base):
    media = FAMILY.media_processor(base[2], tile_processor().to_dict())
    items = [media.item(image(*size)) for size in SIZES]
    joined = Media.join(items)
    assert joined.rows == tuple(item.rows[0] for item in items) and len(joined.pixels) == sum(joined.rows)
    assert llava(clip()).config.model_type == "llava"
