"""What a rank reads: at TP=2 about half of the bytes, from every layout; and NaN, which no rank takes unasked."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import mindspeed_mm as mm
from mindspeed_mm.errors import CheckpointError, WeightError
from mindspeed_mm.models.spec import find_part
from mindspeed_mm.weights import files
from mindspeed_mm.weights.loading import load_part, local_tensor
from mindspeed_mm.weights.sources import open_source
from tests.checkpoint_converters.converter_helpers import clip_state, write_llava
from tests.weights.weight_helpers import empty_state

TEXT = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
VISION = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture
def model(golden, tmp_path):
    """A whole model large enough that norms count for little."""
    return write_llava(tmp_path / "source", golden, text=TEXT, vision=VISION)


@pytest.fixture
def volume(monkeypatch):
    """[bytes read of tensors so far]."""
    read = [0]
    original = files.RawFile._fill

    def count(self, buffer, offset):
        read[0] += len(buffer)
        original(self, buffer, offset)

    monkeypatch.setattr(files.RawFile, "_fill", count)
    return read


def volumes(path, volume, kinds=("text_decoder", "vision_encoder", "vision_projector")):
    """{kind: bytes that rank 1 of 2 reads / bytes that a single rank reads}."""
    source, found = open_source(path), {}
    for kind in kinds:
        part_source = source.part(kind)
        part = find_part(kind, {"text_decoder": "llama", "vision_encoder": "clip", "vision_projector": "mlp"}[kind])
        spec = part.read_config(part_source.config, part_source.dialect) if part_source.config else None
        if spec is None:
            from mindspeed_mm.models.describe import describe_part

            spec = describe_part(part_source, num_attention_heads=2 if kind == "vision_encoder" else None)
        steps = part.rules[part_source.dialect].match(part_source.names, spec.geometry).steps
        counts = []
        for size in (1, 2):
            volume[0] = 0
            for step in steps:
                local_tensor(step, part_source, spec.geometry, size - 1, size)
            counts.append(volume[0])
        found[kind] = counts[1] / counts[0]
    return found


@pytest.mark.parametrize("to", ["llava-hf", "llava", "mindspeed-mm", "checkpoint"])
def test_a_rank_of_two_reads_about_half_of_every_layout_of_whole_models(model, tmp_path, volume, to):
    mm.convert(model, tmp_path / "out", to=to)
    assert all(0.5 <= share < 0.57 for share in volumes(tmp_path / "out", volume).values())


def test_a_rank_of_two_reads_about_half_of_an_old_torch_file(model, tmp_path, volume):
    state = {
        name: tensor for name, tensor in load_file(model / "model.safetensors").items() if "vision_encoder" not in name
    }
    (model / "model.safetensors").unlink()
    torch.save(state, model / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    shares = volumes(model, volume, ("text_decoder", "vision_projector"))
    assert all(0.5 <= share < 0.57 for share in shares.values())


def test_a_rank_of_two_reads_about_half_of_an_openai_archive(golden, volume):
    assert 0.5 <= volumes(golden / "models" / "clip_openai.pt", volume, ("vision_encoder",))["vision_encoder"] < 0.65


def test_an_old_torch_file_is_read_tensor_by_tensor_and_never_beyond_its_end(tmp_path, volume):
    state = {f"mm_projector.{name}": tensor for name, tensor in clip_state({**VISION, **SMALL}).items()}
    state["mm_projector.turned"] = torch.randn(3, 4).t()
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    from mindspeed_mm.weights.torch_file import TorchFile

    file = TorchFile(tmp_path / "old.bin")
    for name, tensor in state.items():
        volume[0] = 0
        assert torch.equal(file.get(name), tensor) and volume[0] == tensor.nbytes
    assert torch.equal(file.get_slice("mm_projector.turned", 0, 1, 3), state["mm_projector.turned"][1:3])
    data = (tmp_path / "old.bin").read_bytes()
    (tmp_path / "old.bin").write_bytes(data[:-100])
    with pytest.raises(WeightError, match="old.bin: the file is cut off or damaged"):
        TorchFile(tmp_path / "old.bin")


SMALL = {"num_hidden_layers": 1, "patch_size": 4, "image_size": 8}


@pytest.mark.parametrize("allowed", [False, True])
def test_nan_is_refused_when_a_model_is_loaded(model, caplog, allowed):
    state = load_file(model / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][2, 3] = torch.nan
    save_file(state, model / "model.safetensors")
    if allowed:
        mm.load(model, device="cpu", allow_nonfinite=True)
        assert "up_proj.weight has 1 NaN or Inf of" in caplog.text
        return
    with pytest.raises(WeightError, match="up_proj.weight has 1 NaN or Inf of .*; expected finite weights"):
        mm.load(model, device="cpu")


def test_only_the_rank_that_holds_a_nan_needs_to_see_it(model, tmp_path):
    """A slice without it loads: the check costs no further reading."""
    state = load_file(model / "model.safetensors")
    state["lm_head.weight"][0, 0] = torch.inf
    save_file(state, model / "model.safetensors")
    part = find_part("text_decoder", "llama")
    source = open_source(model)
    spec = part.read_config(source.part("text_decoder").config, "hf")
    for rank in (0, 1):
        local = empty_state(part, spec, source.part("text_decoder"), tp_size=2)
        if rank == 0:
            with pytest.raises(WeightError, match="lm_head.weight has 1 NaN or Inf"):
                load_part(local, part, spec, source, tp_rank=rank, tp_size=2)
        else:
            load_part(local, part, spec, source, tp_rank=rank, tp_size=2)


def test_a_checkpoint_that_lacks_a_piece_is_refused(model, tmp_path, monkeypatch):
    from checkpoint_converters.checkpoint.source import CheckpointFile

    mm.convert(model, tmp_path / "saved", to="checkpoint")
    part = open_source(tmp_path / "saved").part("vision_projector")
    monkeypatch.setattr(CheckpointFile, "_pieces", lambda self, name: [])
    with pytest.raises(CheckpointError, match="encoder.linear_fc1.weight holds 0 of 4096 values; expected all"):
        part.get("encoder.linear_fc1.weight")


def test_pieces_of_other_shapes_are_refused(model, tmp_path, monkeypatch):
    from checkpoint_converters.checkpoint import source as checkpoint_source

    mm.convert(model, tmp_path / "saved", to="checkpoint")
    part = open_source(tmp_path / "saved").part("vision_projector")
    monkeypatch.setattr(checkpoint_source.TorchFile, "shape", lambda self, name: (1,))
    with pytest.raises(CheckpointError, match=r"a tensor has shape \[1\]; expected \[64, 64\]"):
        part.get("encoder.linear_fc1.weight")


def test_config_and_weights_of_two_models_are_told_apart(model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    for key, value, message in (
        ("intermediate_size", 100, r"layers.0.mlp.gate_proj.weight has shape \[96, 64\]; expected \[100, 64\]"),
        ("head_dim", 8, r"layers.0.self_attn.q_proj.weight has shape \[64, 64\]; expected \[32, 64\]"),
        ("vocab_size", 1000, r"model.embed_tokens.weight has shape \[1003, 64\]; expected \[1000, 64\]"),
        ("mm_hidden_size", 32, r"input_size: found 32, expected 64"),
    ):
        (model / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=message):
            mm.convert(model, tmp_path / "out", to="mindspeed-mm")
