"""A rank reads its slices alone: equal to the slices of the whole tensor, and about half the bytes at TP=2."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mindspeed_mm.models.describe import describe_part
from mindspeed_mm.models.part import find_part
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.text_decoder import llama
from mindspeed_mm.weights import files
from mindspeed_mm.weights.loading import load_part, local_tensor
from mindspeed_mm.weights.shards import shard
from tests.weights.conftest import TINY_LLAMA
from tests.weights.weight_helpers import empty_state, random_hf_state

CONFIG = TINY_LLAMA | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 2, "vocab_size": 13}


def assert_slices(source, spec, tp_size):
    part = find_part(source.part, spec.model_id)
    geometry = spec.geometry
    for step in part.rules[source.dialect].match(source.names, geometry).steps:
        full = step.rule.to_ours([source.get(name) for name in step.sources], geometry)
        for rank in range(tp_size):
            found = local_tensor(step, source, geometry, rank, tp_size)
            assert torch.equal(found, shard(full, step.rule, rank, tp_size, geometry)), step.target


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_slices_of_a_decoder_are_those_of_the_whole(tmp_path, kind, tp_size):
    spec = llama.from_hf(CONFIG)
    state = random_hf_state(spec)
    if kind == "safetensors":
        save_file(state, tmp_path / "model.safetensors")
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert_slices(open_source(tmp_path).part("text_decoder"), spec, tp_size)


@pytest.mark.parametrize("name", ["clip_hf", "clip_openai.pt", "llava_hf", "llava_original"])
def test_slices_of_a_vision_encoder_are_those_of_the_whole(golden_models, golden_spec, name):
    assert_slices(open_source(golden_models / name).part("vision_encoder"), golden_spec.vision_encoder, 2)


def test_slices_of_our_own_files_are_those_of_the_whole(golden_models, golden_spec, tmp_path):
    from checkpoint_converters.convert import convert

    convert(golden_models / "llava_original", tmp_path / "out", to="mindspeed-mm")
    for kind in ("text_decoder", "vision_encoder", "vision_projector"):
        source = open_source(tmp_path / "out").part(kind)
        assert_slices(source, describe_part(source), 2)


def test_at_tp_2_a_rank_reads_about_half(tmp_path, llama_part, monkeypatch):
    config = CONFIG | {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 130}
    spec = llama.from_hf(config)
    save_file(random_hf_state(spec), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    opened = []
    original = files.SafetensorsFile.__init__

    def remember(self, path):
        original(self, path)
        opened.append(self)

    monkeypatch.setattr(files.SafetensorsFile, "__init__", remember)
    volumes = {}
    for size in (1, 2):
        state = empty_state(llama_part, spec, open_source(tmp_path).part("text_decoder"), tp_size=size)
        opened.clear()
        load_part(state, llama_part, spec, open_source(tmp_path), tp_rank=0, tp_size=size)
        volumes[size] = sum(file.bytes_read for file in opened)
    assert volumes[1] == sum(tensor.nbytes for tensor in random_hf_state(spec).values())
    assert 0.5 <= volumes[2] / volumes[1] < 0.52


def test_a_type_that_torch_lacks_is_refused(tmp_path):
    header = b'{"model.embed_tokens.weight":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    with pytest.raises(ValueError, match="has type F4; expected one of|cut off or damaged"):
        files.SafetensorsFile(tmp_path / "x.safetensors").dtype("model.embed_tokens.weight")


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path):
    save_file({"a": torch.zeros(1000)}, tmp_path / "x.safetensors")
    file = files.SafetensorsFile(tmp_path / "x.safetensors")
    with (tmp_path / "x.safetensors").open("r+b") as handle:
        handle.truncate(500)
    with pytest.raises(ValueError, match="became shorter while it was read"):
        file.get("a")
