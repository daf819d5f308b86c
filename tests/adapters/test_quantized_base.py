"""A base that is written in 4 or 8 bits once: runs begin with its bytes, and everything else reads it as weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import mindspeed_mm as mm
from mindspeed_mm.errors import WeightError
from mindspeed_mm.weights.blockwise import Blocks, dequantize, stored_scales
from tests.adapters.test_qlora import run_folder  # noqa: F401  a fixture
from tests.helpers.golden_training import full_tensors
from tests.parallel.test_command import folder as base_folder  # noqa: F401  a fixture
from tests.parallel.test_command import train


def parts_of(folder):
    """The parts' own weights by slot."""
    model = json.loads((folder / "model.json").read_text())
    images = model["image_encoder"]
    found = {"text_decoder": model["text_decoder"]["ckpt_path"]}
    found["vision_encoder"] = images["vision_encoder"]["ckpt_path"]
    return found | {"vision_projector": images["vision_projector"]["ckpt_path"]}


def written_projector(folder):
    """A projector file for the model of a folder."""
    block = json.loads((folder / "model.json").read_text())["image_encoder"]["vision_projector"]
    sizes = {"0.weight": (128, block["input_size"]), "0.bias": (128,), "2.weight": (128, 128), "2.bias": (128,)}
    made = torch.Generator().manual_seed(2)
    tensors = {f"model.mm_projector.{name}": 0.1 * torch.randn(size, generator=made) for name, size in sizes.items()}
    torch.save(tensors, folder / "projector.bin")
    return str(folder / "projector.bin")


@pytest.fixture
def written(run_folder, tmp_path):  # noqa: F811
    """A QLoRA run's folder, and its base written with the same settings beside it."""
    model = json.loads((run_folder / "model.json").read_text())
    block = model["image_encoder"]["vision_projector"]
    del block["fresh"]
    block["ckpt_path"] = written_projector(run_folder)
    (run_folder / "model.json").write_text(json.dumps(model))
    double = model["text_decoder"]["double_quant"]
    mm.convert(parts_of(run_folder), run_folder / "base", to="checkpoint", quantize="nf4", double_quant=double)
    return run_folder, double


@pytest.mark.parametrize("run_folder", [True, pytest.param(False, marks=pytest.mark.slow)], indirect=True)
def test_runs_begin_with_it_at_any_layout(ranks, written):
    """The first steps are those of a run that stores the weights itself, whatever the layout, bit for bit at one."""
    folder, double = written
    place, flags = str(folder), "--train-iters 2 --lr 1e-2"
    assert ranks(1).run(train, place, "own", flags) == [0]
    begin = f"{flags} --pretrained-checkpoint {place}/base"
    assert ranks(1).run(train, place, "one", begin) == [0]
    split = "--tensor-model-parallel-size 2 --sequence-parallel"
    assert ranks(2).run(train, place, "two", f"{begin} {split}") == [0, 0]
    own, one, two, base = (full_tensors(folder / name) for name in ("own", "one", "two", "base"))
    assert own.keys() == one.keys() and all(torch.equal(one[name], own[name]) for name in own)
    stored = [name for name in base if name.endswith((".codes", ".scales", ".ranges"))]
    assert len(stored) == (36 if double else 24)
    for name in stored:
        assert torch.equal(base[name], own[name]) and torch.equal(two[name], own[name])
    for name in own.keys() - set(stored):
        torch.testing.assert_close(two[name], own[name], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("run_folder", [True], indirect=True)
def test_what_reads_it(ranks, written, monkeypatch):
    """As whole weights where these are asked for, with its own bytes where 4 bits are; an adapter knows its base."""
    folder, _ = written
    base = full_tensors(folder / "base")
    linear = "text_decoder.decoder.layers.1.mlp.linear_fc2"
    scales = stored_scales([base[f"{linear}.scales"], base[f"{linear}.ranges"]], axis=1)
    wanted = dequantize(Blocks(base[f"{linear}.codes"], scales), "nf4", torch.float32)
    vlm = mm.load(folder / "base", device="cpu")
    assert torch.equal(vlm.model.text_decoder.decoder.layers[1].mlp.linear_fc2.weight, wanted)
    ids = torch.arange(3, 20)[None]
    whole = vlm.logits(ids)
    from mindspeed_mm.models.adapters import quantized_base

    def refuse(*_given, **_options):
        raise AssertionError("a stored weight was stored again")

    monkeypatch.setattr(quantized_base, "stored_form", refuse)
    stored = mm.load(folder / "base", device="cpu", quantize="nf4", double_quant=True)
    held = stored.model.text_decoder.decoder.layers[1].mlp.linear_fc2
    assert torch.equal(held.codes, base[f"{linear}.codes"]) and torch.equal(held.ranges, base[f"{linear}.ranges"])
    torch.testing.assert_close(stored.logits(ids), whole, atol=1e-5, rtol=0)
    monkeypatch.undo()
    begin = f"--train-iters 2 --lr 1e-2 --pretrained-checkpoint {folder}/base"
    assert ranks(1).run(train, str(folder), "run", begin) == [0]
    mm.convert(folder / "run", folder / "adapter", to="peft", parts=["text_decoder"])
    trained = mm.load(folder / "run", device="cpu").logits(ids)
    plain = json.loads((folder / "model.json").read_text())
    del plain["text_decoder"]["lora"]
    plain["text_decoder"]["freeze"] = True
    (folder / "plain.json").write_text(json.dumps(plain))
    for name in ("base", "plain.json"):  # the record is that of the weights before they were stored
        on = mm.load(folder / name, device="cpu", adapter=folder / "adapter").logits(ids)
        assert (on - trained).abs().max() < 0.05 < (on - whole).abs().max()


# --- What is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run_folder", [False], indirect=True)
def test_what_cannot_be(golden, run_folder, capsys):  # noqa: F811
    from mindspeed_mm.cli.main import main

    source, target = run_folder / "llama", run_folder / "out"
    with pytest.raises(WeightError, match="found quantize 'nf4' for layout hf; expected .*, for layout checkpoint"):
        mm.convert(source, target, to="hf", quantize="nf4")
    with pytest.raises(WeightError, match="found quantize 'nf5' for layout checkpoint"):
        mm.convert(source, target, to="checkpoint", quantize="nf5")
    with pytest.raises(WeightError, match="found double_quant without quantize"):
        mm.convert(source, target, to="checkpoint", double_quant=True)
    narrow = {"text_decoder": golden / "models" / "vicuna"} | {
        slot: path for slot, path in parts_of(run_folder).items() if slot == "vision_encoder"
    }
    narrow["vision_projector"] = golden / "models" / "mm_projector.bin"
    with pytest.raises(WeightError, match="has 96 columns; expected a multiple of 64, the values that share a scale"):
        mm.convert(narrow, target, to="checkpoint", quantize="nf4")
    stored = load_file(source / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    whole = narrow | {"text_decoder": source, "vision_projector": written_projector(run_folder)}
    with pytest.raises(WeightError, match=r"layers.1.mlp.linear_fc1.weight has NaN or Inf, which would spoil the 64"):
        mm.convert(whole, target, to="checkpoint", quantize="nf4", allow_nonfinite=True)
    words = ["convert", str(source), str(target), "--to", "checkpoint", "--quantize", "nf4", "--verify"]
    assert main(words) == 1 and "--quantize rounds them" in capsys.readouterr().err
