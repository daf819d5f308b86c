"""Models of families that are not as they should be: clear errors, never a silent default."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import mindspeed_mm as mm
from mindspeed_mm.data.image import ImageError
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models.describe import describe_model
from mindspeed_mm.models.sources import open_source
from tests.helpers.tiny_families import MAKERS, make_family
from tests.helpers.tiny_llava import clip, fixed_processor, image, llava, save, tile_processor
from tests.helpers.tiny_qwen import patch_processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaVA of transformers."""
    return save(llava(clip()), tmp_path_factory.mktemp("llava"), fixed_processor("clip"))


def changed(folder, target, file="config.json", **changes):
    """A copy of a folder with other values in a JSON file; keys with a dot are those of an inner object."""
    shutil.copytree(folder, target)
    content = json.loads((target / file).read_text())
    for key, value in changes.items():
        outer, _, inner = key.partition("__")
        if inner:
            content[outer][inner] = value
        else:
            content[outer] = value
    (target / file).write_text(json.dumps(content))
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava_onevision"}, 'found model_type "llava_onevision"'),
        ({"text_config__model_type": "qwen4"}, 'no text_decoder here reads model_type "qwen4"; the nearest are qwen'),
        ({"text_config__model_type": "falcon_h1"}, 'reads model_type "falcon_h1"; .*docs/adding_a_family.md'),
        ({"vision_config__model_type": "siglip2_vision_model"}, "the nearest are siglip_vision_model"),
        ({"text_config__sliding_window": 7}, "found sliding_window 7; LlamaForCausalLM without that is supported"),
        ({"text_config__attn_logit_softcapping": 30.0}, "found attn_logit_softcapping 30.0"),
        ({"text_config__final_logit_softcapping": 30.0}, "found final_logit_softcapping 30.0"),
        ({"text_config__is_causal": False}, "found is_causal false"),
        ({"text_config__attention_bias": True}, "found attention_bias true"),
        ({"text_config__rope_parameters": {"rope_type": "spiral"}}, "found RoPE scaling of type 'spiral'"),
        (
            {"text_config__rope_parameters": {"rope_type": "yarn", "factor": 2.0, "colour": 3}},
            r"rope_scaling.colour: unknown key",
        ),
        ({"text_config__rope_parameters": {"full_attention": {"rope_type": "default"}}}, "of their own for full_atten"),
        ({"text_config__hidden_act": "gelu"}, r"the decoder's MLP is SwiGLU \(the file's key: hidden_act\)"),
        ({"vision_config__hidden_act": "relu"}, r"'quick_gelu' or 'gelu' \(the file's key: hidden_act\)"),
        ({"projector_hidden_act": "prelu"}, 'found projector_hidden_act "prelu".* one of gelu, .*tanh'),
        ({"multimodal_projector_bias": False}, r"unknown \(2\): linear_1.bias, linear_2.bias"),
        ({"vision_feature_layer": 7}, r"select_layer 7 \(HF's vision_feature_layer\) is outside the 3 layers"),
        ({"vision_feature_layer": [-2, -1]}, r"\[48, 32\].*\[48, 64\]|\[48, 64\].*\[48, 32\]"),
        ({"vision_feature_layer": [-2, 4]}, r"select_layer \[-2, 4\] .* is outside the 3 layers; expected -4..3, one"),
        ({"vision_feature_select_strategy": "cls"}, "strategy 'cls'; expected default or full"),
        ({"text_config__num_key_value_heads": 4}, "num_attention_heads 6 is not a multiple of num_query_groups 4"),
        ({"text_config__max_position_embeddings": 16}, "expected more than the 16 tokens of one image"),
    ],
)
def test_letter_b_configs_that_would_change_numbers_are_refused(folder, tmp_path, changes, message):
    with pytest.raises((ConfigError, WeightError), match=message) as caught:
        mm.load(changed(folder, tmp_path / "changed", **changes), device="cpu")
    assert str(tmp_path / "changed") in str(caught.value)  # letter F: which config.json it is


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"text_config__hidden_size": 54, "text_config__head_dim": 8},
            r"\[131, 48\].*\[131, 54\]|\[131, 54\].*\[131, 48\]",
        ),
        ({"vision_config__hidden_size": 30}, "32.*30|30.*32"),
        ({"text_config__num_hidden_layers": 3}, "missing.*model.layers.2|model.layers.2.*missing"),
        ({"text_config__vocab_size": 140}, r"131.*140|140.*131"),
    ],
)
def test_configs_of_other_sizes_than_the_weights_are_refused(folder, tmp_path, changes, message):
    with pytest.raises((ConfigError, WeightError), match=f"(?s){message}") as caught:
        mm.load(changed(folder, tmp_path / "changed", **changes), device="cpu")
    assert str(tmp_path / "changed") in str(caught.value)


def test_letter_f_a_config_that_is_wrong_is_named(folder, tmp_path, monkeypatch):
    """Several parts of a model have one each."""
    monkeypatch.chdir(tmp_path)
    changed(folder, Path("llava"), model_type="llava_onevision")  # whose name is a part of the text
    with pytest.raises(ConfigError, match="^llava/config.json: found model_type"):
        open_source("llava")
    wrong = changed(folder, tmp_path / "changed", model_type="llava_onevision")
    with pytest.raises(ConfigError, match=f"^{wrong}/config.json: found model_type"):
        open_source(wrong)
    for key in ("text_config__hidden_act", "vision_config__hidden_act"):
        shutil.rmtree(wrong)
        with pytest.raises(ConfigError, match=f"^{changed(folder, wrong, **{key: 'odd'})}: .* config: 1 problem"):
            describe_model(open_source(wrong))


PROCESSORS = {
    "llava": fixed_processor("clip"),
    "llava_next": tile_processor(),
    "qwen2_5_vl": patch_processor(),
}
FOREIGN = {
    ("llava", "llava_next"): 'image_processor_type is "LlavaNextImageProcessor',
    ("llava", "qwen2_5_vl"): 'image_processor_type is "Qwen2VLImageProcessor',
    ("llava_next", "qwen2_5_vl"): 'image_processor_type is "Qwen2VLImageProcessor',
    ("qwen2_5_vl", "llava"): "CLIPImageProcessor",
    ("qwen2_5_vl", "llava_next"): "LlavaNextImageProcessor",
}
FOREIGN |= {
    (name, other): f'image_processor_type is "{kind}'
    for name in ("blip2", "instructblip", "minigpt4", "flamingo")
    for other, kind in (("llava_next", "LlavaNextImageProcessor"), ("qwen2_5_vl", "Qwen2VLImageProcessor"))
}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """The tiny model of each family by its name."""
    return {name: make_family(name, tmp_path_factory.mktemp("family")) for name in MAKERS}


@pytest.mark.parametrize("pair", FOREIGN, ids=" with that of ".join)
def test_a_processor_of_another_family_is_refused(families, pair):
    base, config = families[pair[0]], PROCESSORS[pair[1]].to_dict()
    with pytest.raises(ConfigError, match=FOREIGN[pair]):
        base.family.media_processor(base.spec, config)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("size", [(1, 1), (1, 150), (150, 1), (2, 300)])
def test_images_of_one_pixel_and_of_extreme_aspect_ratio(families, name, size):
    """Pixels as transformers' processor has them; where it refuses an image, an error that names it."""
    base, shown = families[name], image(*size)
    theirs = transformers.AutoImageProcessor.from_pretrained(base.folder, use_fast=False)
    try:
        wanted = theirs(shown, return_tensors="pt")
    except ValueError:  # Qwen's processor and an aspect ratio of more than 200, or none at all
        with pytest.raises(ImageError):
            base.media.item(shown)
        return
    found = base.family.inputs_of_media(base.spec, base.media.item(shown))
    for key, value in wanted.items():
        assert found[key].shape == value.shape, key
        assert (found[key].double() - value.double()).abs().max() < 1e-5, key
    assert base.media.plan(*size).count > 0


def test_an_image_without_pixels_is_refused(families):
    for base in families.values():
        with pytest.raises(ImageError, match="no pixels|0 x 5|0 pixels"):
            base.media.item(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("name", MAKERS)
def test_deep_greys_are_the_same_image_in_memory_as_in_a_file(families, name, tmp_path):
    """Pillow's own conversion would make 16 bits white and 32 bits black."""
    media = families[name].media
    deep = Image.fromarray(np.linspace(0, 65535, 30 * 40).reshape(30, 40).astype(np.uint16))
    deep.save(tmp_path / "deep.png")
    assert torch.equal(media.item(deep).pixels, media.item(tmp_path / "deep.png").pixels)
    with pytest.raises(ImageError, match="in memory. has 32-bit pixels, whose range no file tells"):
        media.item(Image.new("F", (30, 40)))
