"""Qwen2.5-VL against transformers' classes: pixels, positions, logits, text, export and training."""

import json

import pytest
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import mindspeed_mm as mm
from mindspeed_mm.data.image import ImageError
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.models.describe import describe_model
from mindspeed_mm.models.families.qwen2_5_vl import QWEN2_5_VL
from mindspeed_mm.models.part import find_part
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import find_family
from tests.helpers.golden_training import GoldenLayout
from tests.helpers.tiny_llava import SIZES, close, image, sample, their_greedy
from tests.helpers.tiny_qwen import TAGS, TEXT, VISION, inputs, patch_processor, qwen, save
from tests.helpers.vlm_ranks import ADAM, GRADIENT, STEP, compare, stored, train, trained

FAMILY = find_family("qwen2_5_vl")
VARIANTS = {
    "plain": {},
    "windows of one square": {"vision": {"window_size": 12}},
    "all layers see all": {"vision": {"fullatt_block_indexes": [0, 1, 2]}},
    "tied": {"tie_word_embeddings": True},
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """(transformers' model, ours, the folder)."""
    theirs = qwen(**VARIANTS[request.param])
    folder = save(theirs, tmp_path_factory.mktemp("qwen"))
    return theirs, mm.load(folder, device="cpu"), folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(transformers' model, its folder, our spec)."""
    theirs = qwen()
    folder = save(theirs, tmp_path_factory.mktemp("base"))
    return theirs, folder, describe_model(open_source(folder))


def test_logits(pair):
    theirs, ours, _ = pair
    shown = [image(*size) for size in SIZES]
    own = inputs(FAMILY, ours.spec, sample(ours.media, shown, (7, 3, 1, 4, 5)))
    for key, value in patch_processor()(shown, return_tensors="pt").items():
        torch.testing.assert_close(own[key], value, atol=0, rtol=0)
    with torch.no_grad():
        close(ours.logits(**own), theirs(**own).logits)


def test_greedy_text(pair):
    theirs, ours, _ = pair
    shown = [image(30, 50), image(90, 20)]
    rows = [sample(ours.media, shown[:count], (5,) * (count + 1), seed=count) for count in (2, 1, 0)]
    wanted = [their_greedy(theirs, inputs(FAMILY, ours.spec, row)) for row in rows]
    first = ours.generate(input_ids=rows[0].input_ids, images=shown, max_new_tokens=9, eos_token_id=-1)
    assert first == wanted[:1]
    ragged = [row.input_ids for row in rows]
    assert ours.generate(input_ids=ragged, images=[*shown, shown[0]], max_new_tokens=9, eos_token_id=-1) == wanted


def test_export_is_read_by_transformers(pair, tmp_path):
    theirs, ours, folder = pair
    mm.convert(folder, tmp_path / "ours", to="mindspeed-mm")
    mm.convert(tmp_path / "ours", tmp_path / "out", to="qwen2_5_vl")
    again, report = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    own = inputs(FAMILY, ours.spec, sample(ours.media, [image(30, 50)], (5, 6)))
    with torch.no_grad():
        close(again.eval()(**own).logits, theirs(**own).logits, 0)
        close(mm.load(tmp_path / "out", device="cpu").logits(**own), theirs(**own).logits)


SIDES = st.integers(1, 200)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.tuples(SIDES, SIDES), min_size=0, max_size=3), texts=st.lists(st.integers(0, 9), min_size=4))
@example(sizes=[(1, 200), (200, 1)], texts=[0, 0, 0, 0])
def test_positions_and_pixels_of_any_size(base, sizes, texts):
    theirs, _, spec = base
    media = FAMILY.media_processor(spec, patch_processor().to_dict())
    shown = [image(*size) for size in sizes]
    encoded = sample(media, shown, texts[: len(sizes) + 1])
    own = inputs(FAMILY, spec, encoded)
    if shown:
        for key, value in patch_processor()(shown, return_tensors="pt").items():
            torch.testing.assert_close(own[key], value, atol=0, rtol=0)
    if not encoded.input_ids:
        return
    grids = own.get("image_grid_thw", torch.empty(0, 3, dtype=torch.int64))
    wanted, _ = theirs.model.get_rope_index(own["input_ids"], own["mm_token_type_ids"], image_grid_thw=grids)
    found = FAMILY.positions(spec, torch.tensor(encoded.input_ids), grids)
    assert torch.equal(found, wanted[:, 0])


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    heads=st.integers(1, 3),
    channels=st.sampled_from([4, 8, 12]),
    patch=st.integers(3, 8),
    merge=st.integers(1, 3),
    window=st.integers(1, 4),
    layers=st.integers(1, 3),
    text=st.sampled_from([(3, 1, 8, [1, 1, 2]), (4, 2, 12, [2, 2, 2]), (2, 2, 16, [4, 1, 3])]),
    size=st.tuples(SIDES, SIDES),
)
def test_logits_of_any_geometry(tmp_path_factory, heads, channels, patch, merge, window, layers, text, size):
    vision = {
        "depth": layers,
        "hidden_size": heads * channels,
        "num_heads": heads,
        "patch_size": patch,
        "spatial_merge_size": merge,
        "window_size": window * merge * patch + patch // 2,
        "fullatt_block_indexes": [layers - 1],
        "temporal_patch_size": 1 + merge % 2,
    }
    queries, groups, width, sections = text
    decoder = {
        "num_attention_heads": queries,
        "num_key_value_heads": groups,
        "head_dim": width,
        "hidden_size": queries * width,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": sections},
    }
    theirs = qwen(vision | {"out_hidden_size": queries * width}, decoder)
    sides = {"patch_size": patch, "temporal_patch_size": vision["temporal_patch_size"], "merge_size": merge}
    folder = save(theirs, tmp_path_factory.mktemp("any"), patch_processor(**sides))
    ours = mm.load(folder, device="cpu")
    own = inputs(FAMILY, ours.spec, sample(ours.media, [image(*size)], (5, 6)))
    with torch.no_grad():
        close(ours.logits(**own), theirs(**own).logits)


# --- Training ------------------------------------------------------------------------------------------------------


def samples_of(spec):
    """Three samples: two images, none, one."""
    from dataclasses import replace

    media = FAMILY.media_processor(spec, patch_processor().to_dict())
    rows = [
        sample(media, [image(30, 50), image(90, 20)], (6, 9, 5), seed=1),
        sample(media, [], (23,), seed=5),
        sample(media, [image(1, 7)], (4, 12), seed=9),
    ]
    return [
        replace(
            row,
            positions=FAMILY.positions(
                spec,
                torch.tensor(row.input_ids),
                torch.tensor([item.grid[0].tolist() for item in row.media]).view(-1, 3).long(),
            ),
        )
        for row in rows
    ]


def loss_of(model, spec, samples):
    """transformers' loss of a global batch: the mean over its supervised tokens."""
    counts = [sum(label != -100 for label in encoded.labels[1:]) for encoded in samples]
    losses = [
        model(**inputs(FAMILY, spec, encoded), labels=torch.tensor([encoded.labels])).loss * count
        for encoded, count in zip(samples, counts, strict=True)
    ]
    return sum(losses) / sum(counts)


LAYOUTS = {
    "one rank": GoldenLayout(),
    "packed": GoldenLayout(packed=True),
    "TP2 SP packed": GoldenLayout(tensor=2, flags="--sequence-parallel", packed=True),
    "PP2": GoldenLayout(pipeline=2),
    "CP2 packed": GoldenLayout(context=2, packed=True),
    "TP2 PP2": GoldenLayout(tensor=2, pipeline=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients(base, ranks, name, tmp_path):
    theirs, folder, spec = base
    samples = samples_of(spec)
    theirs.zero_grad()
    loss_of(theirs, spec, samples).backward()
    names = stored(theirs, QWEN2_5_VL)
    wanted = {key: tensor.grad for key, tensor in names.items() if tensor.grad is not None}
    ranks(LAYOUTS[name].ranks).run(train, str(folder), LAYOUTS[name], samples, str(tmp_path), 1, GRADIENT)
    after = trained(tmp_path, spec, QWEN2_5_VL)
    changes = {key: (names[key].detach() - tensor[: len(names[key])]) / STEP for key, tensor in after.items()}
    _compare(changes, wanted)


@pytest.mark.parametrize("name", ["one rank", pytest.param("TP2 PP2", marks=pytest.mark.slow)])
def test_five_steps(base, ranks, name, tmp_path):
    _, folder, spec = base
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).float()
    samples = samples_of(spec)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(theirs, spec, samples).backward()
        optimizer.step()
    ranks(LAYOUTS[name].ranks).run(train, str(folder), LAYOUTS[name], samples, str(tmp_path), 5, ADAM)
    _compare(trained(tmp_path, spec, QWEN2_5_VL), stored(theirs, QWEN2_5_VL))


def _compare(found, wanted):
    """Biases of keys are rows of a fused bias here, and softmax does not see them: they are left out there."""
    for key in [key for key in found if key.endswith("attn.qkv.bias")]:
        width = len(found[key]) // 3
        found[key], wanted[key] = (x[key][torch.arange(3 * width) // width != 1] for x in (found, wanted))
    compare(found, wanted)


# --- Bad input -----------------------------------------------------------------------------------------------------


def test_processors_that_do_not_fit_are_refused(base):
    spec, plain = base[2], patch_processor().to_dict()

    def refused(config, message, **options):
        with pytest.raises(ConfigError, match=message):
            FAMILY.media_processor(spec, config, **options)

    refused({"image_processor_type": "CLIPImageProcessor"}, 'image_processor_type is "CLIPImageProcessor"')
    refused(plain | {"patch_size": 7}, r"found patch_size 7 \(the model: 6\)")
    refused(plain | {"size": {"shortest_edge": 9, "longest_edge": 3}}, "found 9 as fewest and 3 as most pixels")
    refused(plain | {"do_resize": False}, "found do_resize False")
    refused(plain, "pads no image to a square", pad=True)


def test_images_of_extreme_shape_are_refused(base):
    media = FAMILY.media_processor(base[2], patch_processor().to_dict())
    with pytest.raises(ImageError, match="is 1 x 201 pixels; expected sides of a ratio of at most 200"):
        media.item(image(201, 1))
    media.most = media.least = 10**9
    with pytest.raises(ImageError, match="pixels when resized|when resized; at most"):
        media.plan(1000, 1000)


def test_inputs_that_do_not_fit_are_refused(base):
    spec = base[2]
    own = dict(patch_processor()([image(30, 50)], return_tensors="pt"))

    def refused(message, **changes):
        with pytest.raises(ConfigError, match=message):
            FAMILY.media_of_inputs(spec, {key: value for key, value in (own | changes).items() if value is not None})

    refused("takes pixel_values and image_grid_thw together", image_grid_thw=None)
    refused("expected .images, 3. positive numbers", image_grid_thw=torch.tensor([[1, 3, 4]]))
    refused("the patches that image_grid_thw says", pixel_values=own["pixel_values"][1:])
    refused("found pixel_values_videos", pixel_values_videos=own["pixel_values"])
    assert FAMILY.media_of_inputs(spec, {}) is None


def test_placeholders_of_other_images_are_refused(base):
    spec, grids = base[2], torch.tensor([[1, 4, 4]])
    with pytest.raises(DataError, match="3 image positions are not those of images with the grids"):
        FAMILY.positions(spec, torch.tensor([5, -200, -200, -200, 6]), grids)
    with pytest.raises(DataError, match="fewer image positions than images"):
        FAMILY.positions(spec, torch.tensor([5, 6]), grids)


def test_another_model_type_is_not_read_by_its_tensors(base, tmp_path):
    save(base[0], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "qwen3_vl"}))
    with pytest.raises(ConfigError, match='found model_type "qwen3_vl" .*; expected qwen2_5_vl'):
        mm.load(tmp_path, device="cpu")


def test_the_flat_config_of_the_hub(caplog):
    """As the 7B folder has it, down to keys that nobody reads: none is told, and the numbers are transformers'."""
    flat = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "vocab_size": 152064}
    flat |= {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    flat |= {"num_key_value_heads": 4, "max_position_embeddings": 128000, "max_window_layers": 28, "vision_token_id": 9}
    flat |= {"sliding_window": 32768, "use_sliding_window": False, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    flat |= {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "tie_word_embeddings": False}
    vision = {"depth": 32, "hidden_size": 1280, "in_chans": 3, "out_hidden_size": 3584, "spatial_patch_size": 14}
    split = FAMILY.split_config(flat | TAGS | {"vision_config": vision}, "qwen2_5_vl")
    text = find_part("text_decoder", "qwen2").from_hf(split["text_decoder"])
    theirs = transformers.Qwen2_5_VLConfig(**flat).text_config
    assert (text.rotary_base, text.sliding_window) == (theirs.rope_parameters["rope_theta"], theirs.sliding_window)
    assert text.mrope_section == tuple(theirs.rope_parameters["mrope_section"])
    assert find_part("vision_encoder", "qwen2_5_vl").from_hf(split["vision_encoder"]).hidden_size == 1280
    assert "not known here" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fullatt_block_indexes": [9]}, r"full_attention_layers \[9\] \(HF's fullatt_block_indexes\) are outside"),
        ({"window_size": 5}, "window_size 5 holds no square of 2 x 2 patches of 6 pixels"),
        ({"hidden_size": 36}, "kv_channels 18 is no multiple of 4"),
        ({"hidden_act": "gelu"}, r"has SwiGLU \(the file's key: hidden_act\)"),
        ({"rope_theta": 500.0}, "found rope_theta 500.0"),
        ({"rope_scaling": {"type": "linear"}}, "found rope_scaling"),
    ],
)
def test_encoders_that_cannot_be_built(changes, message):
    with pytest.raises(ConfigError, match=message):
        find_part("vision_encoder", "qwen2_5_vl").from_hf(VISION | changes)


def test_longrope_beside_positions_of_images_is_refused():
    factors = [1.0, 1.2, 1.4, 1.6]
    rope = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "mrope_section": [1, 1, 2]}
    config = TEXT | {"model_type": "qwen2_5_vl_text", "rope_parameters": rope}
    with pytest.raises(ConfigError, match="longrope does not go with mrope_section"):
        find_part("text_decoder", "qwen2").from_hf(config)
