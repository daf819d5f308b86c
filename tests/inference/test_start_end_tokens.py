"""Letter B: LLaVA v1.0's <im_start> and <im_end> around each image (mm_use_im_start_end) are honoured everywhere."""

import copy
import json
import shutil

import pytest
import torch

import mindspeed_mm as mm
from checkpoint_converters.convert import convert
from mindspeed_mm.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from mindspeed_mm.data.config import DataConfig
from mindspeed_mm.data.expand import Encoding
from mindspeed_mm.data.sample import Sample, Turn
from mindspeed_mm.data.template import get_template
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.generation.engine import GenerationRequest
from mindspeed_mm.inference.model_json import model_json_of
from mindspeed_mm.models.complete import read_model
from mindspeed_mm.models.family import media_of_data
from mindspeed_mm.models.spec import load_model_spec

START, END = 1001, 1002
NAMES = {1000: "<im_patch>", START: "<im_start>", END: "<im_end>"}


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    """The original code's golden folder as a LLaVA v1.0: three added tokens, two of them around each image."""
    models, target = golden / "models", tmp_path_factory.mktemp("v1") / "model"
    shutil.copytree(models / "llava_original", target)
    for path in target.glob("*.bin"):
        tensors = torch.load(path, weights_only=True)
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            if key in tensors:
                tensors[key] = torch.cat([tensors[key], tensors[key][5:8]])
        torch.save(tensors, path)
    own = {"mm_use_im_start_end": True, "vocab_size": 1003, "mm_vision_tower": str(models / "clip_hf")}
    change(target / "config.json", **own)
    settings = json.loads((target / "tokenizer_config.json").read_text())
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False)
    added = {str(key): {"content": name, **flags} for key, name in NAMES.items()}
    added = {**settings.get("added_tokens_decoder", {}), **added}
    change(target / "tokenizer_config.json", added_tokens_decoder=added)
    return target


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_prompts_have_the_tokens(folder, golden):
    """The original code writes them into the ids, around its one placeholder; answers are those of such ids."""
    vlm = mm.load(folder, device="cpu")
    assert vlm.spec.vision_projector.image_start_end == [START, END]
    count = vlm.tokens_per_image
    assert vlm.media.plan(9, 9).ids == (START, *[IMAGE_TOKEN_INDEX] * count, END)
    assert vlm.media.settings["tags"] == [START, END]
    image = golden / "images" / "src" / "landscape.png"
    ids = vlm.engine().prepare(GenerationRequest("1", turns=(("What is it?", None),), images=(image,)))
    place = ids.index(IMAGE_TOKEN_INDEX)
    assert ids[place - 1] == START and ids[place + count] == END
    written = [*ids[:place], IMAGE_TOKEN_INDEX, *ids[place + count :]]
    wanted = vlm.generate(input_ids=[written], images=[image], max_new_tokens=5)[0]
    assert vlm.generate("What is it?", [image], max_new_tokens=5)[0] == vlm.tokenizer.decode(wanted).strip()


def test_training_samples_have_the_tokens(folder, golden):
    """They stand in the expanded ids and are never learned."""
    vlm = mm.load(folder, device="cpu")
    sample = Sample("1", (Turn("human", "<image>\nWhat?"), Turn("gpt", "A cat.")), ("x.png",), "here")
    ids, labels = Encoding(vlm.tokenizer, get_template("v1"), vlm.media).of(sample)
    place = ids.index(START)
    assert ids[place + vlm.tokens_per_image + 1] == END
    assert set(labels[: place + vlm.tokens_per_image + 2]) == {IGNORE_INDEX}


def test_conversions_keep_the_tokens(folder, tmp_path):
    convert(folder, tmp_path / "ours", to="mindspeed-mm")
    assert mm.load(tmp_path / "ours", device="cpu").media.plan(9, 9).ids[0] == START
    convert(tmp_path / "ours", tmp_path / "llava", to="llava")
    assert json.loads((tmp_path / "llava" / "config.json").read_text())["mm_use_im_start_end"] is True
    assert mm.load(tmp_path / "llava", device="cpu").media.plan(9, 9).ids[0] == START
    assert model_json_of([folder])["image_encoder"]["vision_projector"]["image_start_end"] == [START, END]
    block = {"ckpt_path": str(folder)}
    short = {"text_decoder": block, "image_encoder": {"vision_encoder": block, "vision_projector": block}}
    assert read_model(short).vision_projector.image_start_end == [START, END]
    with pytest.raises(WeightError, match="for which llava-hf has no key: its processor would leave them out"):
        convert(folder, tmp_path / "hf", to="llava-hf")


def test_a_tokenizer_without_the_tokens_is_refused(golden, tmp_path):
    models, target = golden / "models", tmp_path / "model"
    shutil.copytree(models / "llava_original", target)
    change(target / "config.json", mm_use_im_start_end=True, mm_vision_tower=str(models / "clip_hf"))
    with pytest.raises(ConfigError, match="mm_use_im_start_end true, and no <im_start> and no <im_end> in the vocab"):
        mm.load(target, device="cpu")


@pytest.mark.parametrize("said", [True, False, None])
def test_a_data_json_must_agree_with_the_model(folder, said):
    block = model_json_of([folder])
    plain = copy.deepcopy(block)
    del plain["image_encoder"]["vision_projector"]["image_start_end"]
    side = block["image_encoder"]["vision_encoder"]["image_size"]
    images = {"train_pipeline": {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}}
    parameters = {
        "dataset_type": "multimodal",
        "basic_parameters": {"data_path": "a.json"},
        "preprocess_parameters": images,
    }
    config = DataConfig.load({"dataset_param": {**parameters, "mm_use_im_start_end": said}})
    for model, has in ((block, True), (plain, False)):
        spec = load_model_spec(model)
        if said in (None, has):
            assert (len(media_of_data(spec, config).fixed.ids) > spec.vision_encoder.num_image_tokens) is has
        else:
            with pytest.raises(ConfigError, match="image_start_end.: leave the key out of data.json"):
                media_of_data(spec, config)
