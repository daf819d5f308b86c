"""Strict JSON: every problem is reported, with its path."""

import json

import pytest

from mindspeed_mm.config import StrictModel, load_config, read_json
from mindspeed_mm.config.load import MAX_CONFIG_BYTES
from mindspeed_mm.errors import ConfigError


class ToyPart(StrictModel):
    num_layers: int
    eps: float = 1e-5
    freeze: bool = False
    size: tuple[int, int] | None = None


class Whole(StrictModel):
    model_id: str
    decoder: ToyPart
    parts: list[ToyPart] = []


GOOD = {"model_id": "llava", "decoder": {"num_layers": 4, "eps": 1, "size": [1, 2]}}


def test_load_from_file_with_byte_order_mark(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(GOOD), encoding="utf-8-sig")
    whole = load_config(Whole, path, what="model config")
    assert whole.decoder.num_layers == 4
    assert whole.decoder.eps == 1.0 and isinstance(whole.decoder.eps, float)
    assert whole.decoder.size == (1, 2)


class Several(StrictModel):
    value: str | list[str]
    part: ToyPart | bool = False


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"value": 3}, ["value: found 3 (integer); input should be a valid string or a valid array"]),
        ({"value": ["a", 3]}, ["value[1]: found 3 (integer); input should be a valid string"]),
        (
            {"value": "a", "part": {"num_layer": 1}},
            ["part.num_layers: missing", "part.num_layer: unknown key; did you"],
        ),
        ({"part": 3}, ["value: missing", "part: found 3 (integer); input should be an object or a valid boolean"]),
    ],
)
def test_a_value_of_several_kinds_is_one_problem(bad, told):
    with pytest.raises(ConfigError) as caught:
        load_config(Several, bad, what="toy")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"toy: {len(told)} problem") and len(lines) == len(told) + 1
    for line, words in zip(lines[1:], told, strict=True):
        assert line.strip().startswith(words)


def test_all_problems_at_once():
    parts = [{"num_layers": "4"}, {"num_layers": True}]
    bad = {"model_id": 3, "decoder": {"num_layer": 4, "freeze": 1}, "parts": parts}
    with pytest.raises(ConfigError) as caught:
        load_config(Whole, bad, what="model config", context="model.json")
    message = str(caught.value)
    assert message.startswith("model config (model.json): 6 problems")
    assert "model_id: found 3 (integer)" in message
    assert 'decoder.num_layer: unknown key; did you mean "num_layers"?' in message
    assert "decoder.num_layers: missing" in message
    assert "decoder.freeze: found 1 (integer); input should be a valid boolean" in message
    assert 'parts[0].num_layers: found "4" (string)' in message
    assert "parts[1].num_layers: found true (boolean)" in message


def test_unknown_key_without_a_near_one_lists_the_known_ones():
    with pytest.raises(ConfigError, match="zzz: unknown key; known keys: model_id, decoder, parts"):
        load_config(Whole, GOOD | {"zzz": 1}, what="model config")


def test_bool_is_not_a_float():
    with pytest.raises(ConfigError, match=r"decoder.eps: found true \(boolean\)"):
        load_config(Whole, {"model_id": "a", "decoder": {"num_layers": 1, "eps": True}}, what="model config")


def test_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_config(Whole, GOOD, what="model config").model_id = "other"


def test_not_json_values():
    with pytest.raises(ConfigError, match="not made of JSON values"):
        load_config(Whole, {"model_id": {1, 2}}, what="model config")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n "b" 2}', "not JSON: .* line 2, column 6"),
        (b"", "not JSON"),
        (b"[1]", r"holds \[1\] \(array\); expected a JSON object"),
        (b'{"a": 1, "a": 2}', 'key "a" is given twice'),
        (b'{"a": NaN}', "found NaN"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"a":' + b"[" * 200_000, "nested too deeply"),
        (b" " * (MAX_CONFIG_BYTES + 1), "larger than"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_json(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ConfigError, match="cannot read .*none.json: No such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_json(tmp_path)
