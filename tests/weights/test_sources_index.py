"""Shards and the index that lists them; the JSON files of a folder."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.sources import open_source


@pytest.fixture
def sharded(tiny_llama):
    """(folder, index) of the tiny Llama in two shards."""
    folder, _, state = tiny_llama
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    table = {}
    for number, part in enumerate((names[:6], names[6:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        table.update(dict.fromkeys(part, file))
    write_index(folder, table)
    return folder, table


def write_index(folder, table):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def test_shards_are_read_by_their_index(sharded, tiny_llama):
    folder, _ = sharded
    part = open_source(folder).part("text_decoder")
    assert sorted(part.names) == sorted(tiny_llama[2])
    assert all(torch.equal(part.get(name), tiny_llama[2][name]) for name in part.names)


def test_an_index_that_names_a_missing_shard(sharded):
    folder, _ = sharded
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightError, match="names model-00002-of-00002.safetensors, not found"):
        open_source(folder)


@pytest.mark.parametrize("outside", ["../other.safetensors", "/etc/passwd", "a/../../b", "", "..\\b"])
def test_an_index_that_points_outside_its_folder(sharded, outside):
    folder, table = sharded
    write_index(folder, {**table, "lm_head.weight": outside})
    with pytest.raises(WeightError, match="points outside"):
        open_source(folder)


def test_a_tensor_in_two_shards(sharded):
    folder, _ = sharded
    second = folder / "model-00002-of-00002.safetensors"
    save_file({**load_file(second), "lm_head.weight": torch.zeros(11, 8)}, second)
    with pytest.raises(WeightError, match="tensor lm_head.weight is both in model-00001.* and in model-00002"):
        open_source(folder)


def test_an_index_that_does_not_fit_its_shards(sharded):
    folder, table = sharded
    write_index(folder, {**table, "lm_head.weight": "model-00002-of-00002.safetensors"})
    with pytest.raises(WeightError, match="puts tensor lm_head.weight in model-00002"):
        open_source(folder)
    write_index(folder, {name: file for name, file in table.items() if name != "lm_head.weight"})
    with pytest.raises(WeightError, match="does not list 1 tensors .* such as lm_head.weight"):
        open_source(folder)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_table(sharded, content):
    (sharded[0] / "model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightError, match="weight_map is not a table"):
        open_source(sharded[0])


@pytest.mark.parametrize(("content", "message"), [("{", "cannot be read as JSON"), ("[]", "holds a JSON list")])
def test_a_config_that_is_not_a_json_object(tiny_llama, content, message):
    (tiny_llama[0] / "config.json").write_text(content)
    with pytest.raises(WeightError, match=message):
        open_source(tiny_llama[0])


def test_a_json_file_that_is_too_large(tiny_llama, monkeypatch):
    monkeypatch.setattr("mindspeed_mm.weights.files.MAX_JSON_BYTES", 10)
    with pytest.raises(WeightError, match="config.json is larger than 10 bytes"):
        open_source(tiny_llama[0])


def test_two_indexes_are_ambiguous(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.index.json").write_text("{}")
    with pytest.raises(WeightError, match="found a.index.json, b.index.json; expected one of"):
        open_source(tmp_path)


def test_letter_d_an_adapter_beside_whole_weights_is_told(tiny_llama, caplog):
    """transformers would load the adapter's own base in their place."""
    folder = tiny_llama[0]
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert "text_decoder" in open_source(folder).parts
    assert caplog.text.count("holds a LoRA adapter (adapter_model) beside whole weights") == 1
    assert f"give --adapter {folder}" in caplog.text
