"""Logits, features and greedy tokens of every layout against transformers' values."""

import json

import pytest
import torch
from safetensors.torch import load_file

import mindspeed_mm as mm
from tests.helpers.golden_model import load_expected, model_json

CASES = ("text_only", "one_image", "batch_two", "two_images")
IMAGE_ID = 1000
LAYOUTS = {
    "llava_hf": {},
    "llava_original": {},
    "vicuna + clip_hf": {},
    "vicuna_bin + clip_openai": {"text_decoder": "vicuna_bin", "vision_encoder": "clip_openai.pt"},
}


@pytest.fixture(scope="module", params=LAYOUTS)
def vlm(request, golden, tmp_path_factory):
    if "+" not in request.param:
        return mm.load(golden / "models" / request.param, device="cpu")
    path = tmp_path_factory.mktemp("spec") / "model.json"
    path.write_text(json.dumps(model_json(golden, **LAYOUTS[request.param])))
    return mm.load(path, device="cpu", tokenizer=golden / "tokenizer", image_processor=golden / "models" / "clip_hf")


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(vlm, golden, case):
    expected = load_expected(golden, case)
    ids = expected["expanded_input_ids"]
    ids = ids.where(ids != IMAGE_ID, torch.tensor(-200))
    mask = expected["expanded_attention_mask"]
    logits = vlm.logits(ids, mask, expected.get("pixel_values"))
    assert logits.dtype == torch.float32
    difference = (logits[..., :1000] - expected["logits"])[mask.bool()].abs().max()
    assert difference < 3e-4
    if logits.shape[-1] > 1000:
        assert (logits[..., 1000:] - expected["logits_extra"])[mask.bool()].abs().max() < 3e-4


@pytest.mark.parametrize("case", CASES[1:])
def test_features_equal_transformers(vlm, golden, case):
    expected = load_expected(golden, case)
    features = vlm.vision_features(expected["pixel_values"])
    assert (features - expected["vision_features"]).abs().max() < 1e-4
    assert (vlm.project(features) - expected["projected"]).abs().max() < 1e-4


def test_greedy_tokens_equal_transformers(vlm, golden):
    meta = json.loads((golden / "expected" / "meta.json").read_text())
    images = load_file(golden / "images" / "preprocessed.safetensors")
    for name, case in meta["generation"].items():
        shown = [images[f"{image}.pad"] for image in case["images"]]
        free = vlm.generate(input_ids=case["input_ids"], images=shown, max_new_tokens=24, eos_token_id=-1)
        assert free == [case["new_tokens_no_stop"]], name
        stopped = vlm.generate(input_ids=case["input_ids"], images=shown, max_new_tokens=24)
        assert stopped == [case["new_tokens_eos_stop"]], name


def test_greedy_tokens_do_not_depend_on_the_batch(vlm, golden):
    meta = json.loads((golden / "expected" / "meta.json").read_text())
    images = load_file(golden / "images" / "preprocessed.safetensors")
    cases = list(meta["generation"].values())
    shown = [images[f"{image}.pad"] for case in cases for image in case["images"]]
    rows = [case["input_ids"] for case in cases]
    together = vlm.generate(input_ids=rows, images=shown, max_new_tokens=24)
    assert together == [case["new_tokens_eos_stop"] for case in cases]


def test_left_padding_is_hidden(vlm, golden):
    expected = load_expected(golden, "text_only")
    ids = expected["expanded_input_ids"]
    padding = torch.zeros(1, 5, dtype=ids.dtype)
    mask = torch.cat((torch.zeros_like(padding), torch.ones_like(ids)), dim=1)
    logits = vlm.logits(torch.cat((padding, ids), dim=1), mask)
    assert (logits[:, 5:, :1000] - expected["logits"]).abs().max() < 3e-4


def test_raw_image_to_text(vlm, golden):
    answer = vlm.generate("What is this?", [golden / "images" / "src" / "landscape.png"], max_new_tokens=4)
    assert len(answer) == 1 and isinstance(answer[0], str)


def test_image_count_must_fit(vlm, golden):
    with pytest.raises(ValueError, match="0 image tokens for 1 images"):
        vlm.generate(input_ids=[1, 5, 7], images=[torch.zeros(3, 56, 56)])
    with pytest.raises(ValueError, match="16 image positions but its images have 0 features"):
        vlm.logits(torch.full((1, 16), -200))
    with pytest.raises(ValueError, match="exceed the model's context of 2048 tokens"):
        vlm.generate(input_ids=[1, 5, 7], max_new_tokens=2048)
