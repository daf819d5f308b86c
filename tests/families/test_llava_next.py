"""LLaVA-NeXT against transformers' classes: pixels, counts, logits, gradients, text, training and both layouts."""

import copy

import pytest
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import mindspeed_mm as mm
from mindspeed_mm.models.describe import describe_model
from mindspeed_mm.models.families.llava_next import LLAVA_NEXT_HF
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import find_family
from tests.helpers.golden_training import GoldenLayout
from tests.helpers.tiny_llava import (
    FULL,
    IMAGE_ID,
    SIZES,
    clip,
    close,
    image,
    inputs,
    llava_next,
    sample,
    save,
    siglip,
    text,
    their_greedy,
    their_loss,
    tile_processor,
    words,
)
from tests.helpers.vlm_ranks import ADAM, GRADIENT, STEP, compare, stored, train, trained
from tests.parallel.comparison import names

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
    wanted = [their_greedy(theirs, inputs(FAMILY, ours.spec, row)) for row in rows]
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
    model = copy.copy(theirs.model)
    model.config = copy.deepcopy(theirs.config)
    model.config.vision_config.patch_size = patch
    model.config.image_grid_pinpoints = pinpoints
    features = torch.randn(item.rows[0], patches**2, 48)
    newline = theirs.model.image_newline
    packed, _ = model.pack_image_features([features], wanted["image_sizes"], "default", newline)
    assert len(packed[0]) == plan.count
    from mindspeed_mm.models.kit.llava_next import _places

    places = _places(features.shape[0] * patches**2, item.rows[0], (height, width), plan.grid[1:], 0, -1)
    ours = torch.cat((features.flatten(0, 1), newline[None]))[places]
    torch.testing.assert_close(ours, packed[0], atol=0, rtol=0)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    heads=st.integers(1, 3),
    channels=st.sampled_from([4, 6, 10]),
    patch=st.sampled_from([7, 10, 17]),
    grids=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3, unique=True),
    size=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    kind=st.sampled_from([clip, siglip]),
)
def test_logits_of_any_geometry(tmp_path_factory, heads, channels, patch, grids, size, kind):
    side = 2 * patch
    vision = {
        "hidden_size": heads * channels,
        "num_attention_heads": heads,
        "image_size": side,
        "patch_size": patch,
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


@pytest.mark.parametrize("name", names(LAYOUTS, slow=("TP2", "CP2")))
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


@pytest.mark.parametrize("name", ["one rank", pytest.param("TP2 PP2", marks=pytest.mark.slow)])
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
