"""mm.load and what it finds beside the weights."""

import json
import shutil

import pytest
import torch

import mindspeed_mm as mm
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.inference.locate import locate
from mindspeed_mm.models.masks import complete_mask


def test_import_is_light():
    import subprocess
    import sys

    code = "import sys, mindspeed_mm; assert not {'torch', 'megatron.core', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        mm.lod  # noqa: B018


def test_unknown_dtype(golden):
    with pytest.raises(ConfigError, match="dtype 'fp8' is not known: expected one of"):
        mm.load(golden / "models" / "llava_hf", device="cpu", dtype="fp8")


def test_parallel_sizes_need_as_many_processes(golden):
    with pytest.raises(ConfigError, match="size 2 and pipeline-parallel size 1 need 2 processes, found 1"):
        mm.load(golden / "models" / "llava_hf", device="cpu", tensor_model_parallel_size=2)


def test_letter_f_half_a_model_is_joined_with_the_others(golden, tmp_path):
    """A cure that fits who gave one path, as `infer` takes it; carried out, it cures."""
    from mindspeed_mm.cli.main import main

    models = golden / "models"
    with pytest.raises(WeightError, match="expected a whole model, with a text_decoder and a vision_projector"):
        locate(models / "clip_hf")
    with pytest.raises(WeightError, match="expected a whole model, with a vision_encoder and a") as caught:
        locate(models / "vicuna")
    told = str(caught.value).partition("mindspeed-mm convert ")[2].partition(", then")[0].split()
    places = {"ENCODER": models / "clip_hf", "PROJECTOR": models / "mm_projector.bin", "TARGET": tmp_path / "joined"}
    assert main(["convert", *(str(places.get(word, word)) for word in told)]) == 0
    assert locate(tmp_path / "joined").spec.vision_projector.num_layers == 2


def test_missing_vision_encoder_config_is_named(golden, tmp_path):
    shutil.copytree(golden / "models" / "llava_original", tmp_path / "llava")
    with pytest.raises(WeightError, match="clip_hf.*is not there; put the encoder's folder at that path"):
        locate(tmp_path / "llava")


def test_missing_config_is_named(golden, tmp_path):
    shutil.copytree(golden / "models" / "llava_hf", tmp_path / "llava")
    (tmp_path / "llava" / "config.json").unlink()
    with pytest.raises(ConfigError, match="config.json is missing"):
        locate(tmp_path / "llava")


def test_missing_tokenizer_and_processor_are_named(golden, tmp_path):
    folder = tmp_path / "llava"
    shutil.copytree(golden / "models" / "llava_hf", folder)
    for file in ("tokenizer.json", "tokenizer.model", "preprocessor_config.json"):
        (folder / file).unlink()
    vlm = mm.load(folder, device="cpu")
    with pytest.raises(ConfigError, match="holds no tokenizer: give --tokenizer"):
        vlm.tokenizer  # noqa: B018
    with pytest.raises(ConfigError, match="holds no preprocessor_config.json: .*--image-processor"):
        vlm.image_processor  # noqa: B018


def test_generate_wants_prompts_or_ids(golden):
    vlm = mm.load(golden / "models" / "llava_hf", device="cpu")
    with pytest.raises(ConfigError, match="either prompts or input_ids"):
        vlm.generate()
    with pytest.raises(ConfigError, match="2 prompts came with 1 lists of images"):
        vlm.generate(["a", "b"], [[]])


def test_pad_follows_the_checkpoint(golden, tmp_path):
    shutil.copytree(golden / "models" / "clip_hf", tmp_path / "clip_hf")
    shutil.copytree(golden / "models" / "llava_original", tmp_path / "llava")
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    for value, pad in (("pad", True), ("square", False)):
        config["image_aspect_ratio"] = value
        (tmp_path / "llava" / "config.json").write_text(json.dumps(config))
        assert locate(tmp_path / "llava").pad is pad


@pytest.mark.parametrize("rows", [[[1, 1, 1]], [[1, 1, 0]], [[1, 0, 0], [1, 1, 1]]])
def test_right_padding_needs_no_mask(rows):
    assert complete_mask(torch.tensor(rows), torch.zeros(len(rows), 3)) is None


def test_left_padding_is_hidden_and_every_query_attends():
    mask = complete_mask(torch.tensor([[0, 1, 1]]), torch.zeros(1, 3))
    assert mask[0, 0].tolist() == [[True, False, False], [False, True, False], [False, True, True]]


def test_model_json_finds_what_lies_beside_its_weights(golden, tmp_path):
    from tests.helpers.golden_model import model_json

    path = tmp_path / "model.json"
    path.write_text(json.dumps(model_json(golden)))
    located = locate(path)
    assert located.tokenizer == golden / "models" / "vicuna"
    assert located.image_processor == golden / "models" / "clip_hf"


def test_vision_encoder_of_23_layers_must_say_what_it_is():
    from mindspeed_mm.models.vision_encoder.clip import ClipSpec

    shape = {"num_layers": 23, "hidden_size": 1024, "patch_size": 14, "image_size": 336}
    with pytest.raises(ValueError, match="num_layers 23 can mean CLIP-L without its unused last layer"):
        ClipSpec(**shape)
    assert ClipSpec(**shape, select_layer=-1).num_built_layers == 23
    assert ClipSpec(**shape | {"num_layers": 24}).num_built_layers == 23


def test_letter_f_a_tied_head_names_the_key_of_the_config_at_hand(golden, tmp_path):
    folder = tmp_path / "models" / "tied"
    shutil.copytree(golden / "models" / "llava_original", folder)
    (tmp_path / "models" / "clip_hf").symlink_to(golden / "models" / "clip_hf")
    for path in folder.glob("*.bin"):
        tensors = torch.load(path, weights_only=True)
        if tensors.pop("lm_head.weight", None) is not None:
            torch.save(tensors, path)
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    del index["weight_map"]["lm_head.weight"]
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightError, match='set "tie_word_embeddings": true in its config.json'):
        mm.load(folder, device="cpu")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert mm.load(folder, device="cpu").spec.text_decoder.share_embeddings_and_output_weights  # the cure cures


def test_letter_f_a_stage_1_folder_is_told_how_it_is_joined(golden, tmp_path):
    from mindspeed_mm.cli.main import main

    models, stage_1 = golden / "models", tmp_path / "stage1"
    stage_1.mkdir()
    shutil.copy(models / "mm_projector.bin", stage_1)
    shutil.copy(models / "llava_original" / "config.json", stage_1)
    with pytest.raises(WeightError, match="Stage 1 trains the projector alone; join it") as caught:
        locate(stage_1)
    told = str(caught.value).partition("mindspeed-mm convert ")[2].partition(", then")[0].split()
    places = {"DECODER": str(models / "vicuna"), "ENCODER": str(models / "clip_hf"), "TARGET": str(tmp_path / "joined")}
    assert main(["convert", *(places.get(word, word) for word in told)]) == 0
    assert mm.load(tmp_path / "joined", device="cpu").spec.text_decoder.num_layers > 0
