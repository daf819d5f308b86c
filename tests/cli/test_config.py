"""`mindspeed-mm config init`: a model.json from weights at hand."""

import json
import shutil

import pytest

import mindspeed_mm as mm
from mindspeed_mm.cli.main import main
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.inference.model_json import model_json_of
from mindspeed_mm.models.spec import load_model_spec


def test_parts_and_a_new_projector(golden, capsys):
    models = golden / "models"
    assert main(["config", "init", str(models / "vicuna"), str(models / "clip_hf")]) == 0
    block = json.loads(capsys.readouterr().out)
    assert block["text_decoder"]["ckpt_path"] == str(models / "vicuna")
    assert block["image_encoder"]["vision_encoder"]["ckpt_path"] == str(models / "clip_hf")
    assert "ckpt_path" not in block["image_encoder"]["vision_projector"]
    spec = load_model_spec(block)
    assert (spec.vision_projector.input_size, spec.vision_projector.hidden_size) == (64, 96)


@pytest.mark.parametrize("layout", ["llava_hf", "llava_original"])
def test_a_whole_model(golden, layout):
    path = golden / "models" / layout
    spec = load_model_spec(model_json_of([path]))
    assert all(part.ckpt_path == str(path) for part in spec.part_specs().values())


def test_what_is_missing_is_named(golden):
    with pytest.raises(WeightError, match="hold no vision_encoder; expected both"):
        model_json_of([golden / "models" / "vicuna"])


def with_config(folder, target, **changes):
    """A copy of a CLIP folder with other keys in its config.json; None takes one out."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text()) | changes
    said = {key: value for key, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(said))
    return target


@pytest.mark.parametrize(
    ("layout", "changes", "key"),
    [
        ("clip_hf", {}, "found num_attention_heads 4 and"),
        ("llava_hf", {}, r"found vision_config\.num_attention_heads 4 and"),
        ("clip_hf", {"num_attention_heads": None, "hidden_size": 48}, "found no num_attention_heads, .* for 12, and"),
    ],
)
def test_other_heads_than_the_folders_own_are_refused(golden, tmp_path, layout, changes, key):
    models = golden / "models"
    folder = with_config(models / layout, tmp_path / "changed", **changes) if changes else models / layout
    message = rf"{folder}/config\.json: {key} --num-attention-heads 2; expected the same number.* Leave --num-attention"
    with pytest.raises(ConfigError, match=message):
        model_json_of([folder, models / "vicuna"], num_attention_heads=2)


def test_heads_that_the_folder_says_too_or_does_not_say_are_taken(golden, tmp_path):
    models, archive = golden / "models", tmp_path / "ours"

    def heads(encoder, given):
        block = model_json_of([models / "vicuna", encoder], num_attention_heads=given)
        return load_model_spec(block).vision_encoder.num_attention_heads

    assert heads(models / "clip_hf", 4) == 4
    assert heads(models / "clip_openai.pt", 2) == 2
    mm.convert(models / "clip_openai.pt", archive, to="mindspeed-mm")
    assert heads(archive, 2) == 2  # the conversion had to assume them
    mm.convert(models / "clip_hf", tmp_path / "sure", to="mindspeed-mm")
    with pytest.raises(ConfigError, match=r"sure: found num_attention_heads 4 and .* or convert the weights again"):
        heads(tmp_path / "sure", 2)
