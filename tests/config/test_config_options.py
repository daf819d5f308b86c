"""`--cfg-options`: values that the command line changes, and each error."""

import argparse
import json

import pytest

from mindspeed_mm.cli.flags.cfg_options import add_cfg_options
from mindspeed_mm.config.inherit import read_config
from mindspeed_mm.config.options import take_options
from mindspeed_mm.data.config import DataConfig
from mindspeed_mm.errors import ConfigError

MODEL = {"decoder": {"layers": 4, "name": "a", "lora": None}, "parts": [{"x": 1}, {"x": 2}]}


@pytest.fixture
def taken(tmp_path):
    """The namespace of a command line whose model.json is MODEL."""
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    (tmp_path / "data.json").write_text("{}")

    def taken(*options, data=True):
        parser = argparse.ArgumentParser()
        parser.add_argument("--mm-model", default=str(tmp_path / "model.json"))
        parser.add_argument("--mm-data", default=str(tmp_path / "data.json") if data else None)
        add_cfg_options(parser)
        namespace = parser.parse_args(["--cfg-options", *options] if options else [])
        take_options(namespace)
        return namespace

    return taken


def test_values_are_json_or_else_texts(taken):
    options = ("model.decoder.layers=8", "model.decoder.name=b=c", "model.parts[0].x=null", "model.parts.1.x=[1,2]")
    namespace = taken(*options, "model.decoder.lora.r=8", 'data.new={"a": true}', "--cfg-options", "data.text=")
    assert read_config(namespace.mm_model) == {
        "decoder": {"layers": 8, "name": "b=c", "lora": {"r": 8}},
        "parts": [{"x": None}, {"x": [1, 2]}],
    }
    assert read_config(namespace.mm_data) == {"new": {"a": True}, "text": ""}
    assert str(namespace.mm_model).endswith("model.json with --cfg-options")


def test_without_options_the_paths_stay(taken):
    assert isinstance(taken().mm_model, str)
    assert isinstance(taken("model.a=1").mm_data, str)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model.decoder", r'"model\.decoder" has no value: expected model\.KEY=VALUE or data\.KEY=VALUE'),
        ("decoder.layers=1", r'begins with "decoder", which is no file: expected model\.KEY=VALUE'),
        ("model=1", r'"model=1" has an empty key'),
        ("model..x=1", r'"model\.\.x=1" has an empty key'),
        ("model.x=NaN", r'"model\.x": found NaN, which is not JSON'),
        ('model.x={"a":1,"a":2}', r'key "a" is given twice in one object'),
        (
            "model.decoder.layers.x=1",
            r"--cfg-options model\.decoder\.layers\.x: decoder\.layers is 4, which holds no x",
        ),
        ("model.parts.2.x=1", r"parts is a list of 2, found 2; expected an index from 0 to 1"),
        ("model.parts.-1.x=1", r"parts is a list of 2, found -1; expected an index"),
        ("model.parts.first=1", r"parts is a list of 2, found first; expected an index"),
    ],
)
def test_options_that_cannot_be_used(taken, option, message):
    with pytest.raises(ConfigError, match=message):
        read_config(taken(option).mm_model)


def test_an_option_twice_and_one_of_a_missing_file(taken):
    with pytest.raises(ConfigError, match=r"--cfg-options model\.parts\.0\.x is given twice: keep one"):
        taken("model.parts[0].x=1", "model.parts.0.x=2")
    with pytest.raises(ConfigError, match=r"data\.x changes the file of --mm-data, which is not given: add --mm-data"):
        taken("data.x=1", data=False)


def test_unknown_keys_get_the_schemas_error(taken):
    namespace = taken("data.dataloader_param.shufle=true")
    with pytest.raises(ConfigError, match=r'with --cfg-options[^$]*shufle: unknown key; did you mean "shuffle"'):
        DataConfig.load(namespace.mm_data)
