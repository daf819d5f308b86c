"""`mindspeed-mm config init`: a model.json from weights at hand."""

import json

import pytest

from mindspeed_mm.cli.main import main
from mindspeed_mm.errors import WeightError
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
