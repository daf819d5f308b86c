"""`mindspeed-mm merge`: adapters into a base, also in another layout, and what it prints of the result."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mindspeed_mm as mm
from checkpoint_converters.merge import merge
from mindspeed_mm.cli.main import main
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.sources import open_source
from tests.adapters.test_peft_folders import adapted
from tests.helpers.tiny_decoders import make, rows, save
from tests.helpers.tiny_llava import IMAGE_ID, clip, close, llava, llava_next, save_original
from tests.helpers.tiny_llava import save as save_llava

BOTH = r".*(language_model|vision_tower).*\.(q_proj|fc1|up_proj)"


@pytest.fixture
def whole(tmp_path):
    """(transformers' LLaVA, its folder, an adapter of decoder and vision encoder, PEFT's model)."""
    model = llava(clip())
    base = save_llava(model, tmp_path / "base")
    wrapped = adapted(model, tmp_path / "adapter", target_modules=BOTH, modules_to_save=["multi_modal_projector"])
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "modules_to_save" in key:
                parameter.add_(0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter", wrapped


def command(base, adapter, target, *more):
    assert main(["merge", str(base), str(adapter), "--output", str(target), *more]) == 0


def shown(capsys):
    """The line that compares."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("merged against adapter-on")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("to", [None, "llava", "llava-hf"])
def test_a_whole_model(whole, tmp_path, capsys, to):
    base, adapter, wrapped = whole
    ids = rows(1, 30)
    ids[ids == IMAGE_ID] = 5
    ids[:, 2:18] = IMAGE_ID
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = wrapped(input_ids=ids, pixel_values=pixels).logits
    command(base, adapter, tmp_path / "merged", *([] if to is None else ["--to", to]))
    line = shown(capsys)
    assert "logits (" in line and float(line.split("max |d| ")[1].split(",")[0]) < 1e-4 and "agreement 1.0000" in line
    found = mm.load(tmp_path / "merged", device="cpu").logits(ids.where(ids != IMAGE_ID, -200), pixel_values=pixels)
    close(found, wanted[..., : found.shape[-1]])  # llava has no row for the image's token
    (name,) = json.loads((tmp_path / "merged" / "merged_adapters.json").read_text()).values()
    assert name == "adapter"
    with pytest.raises(WeightError, match="was merged into .* already"):
        merge(tmp_path / "merged", [adapter], tmp_path / "twice")


def test_convert_with_an_adapter(whole, tmp_path, capsys):
    """The same weights as merge --to."""
    base, adapter, _ = whole
    words = ["convert", str(base), "--to", "llava", "--adapter", str(adapter)]
    assert main([*words, str(tmp_path / "converted")]) == 0
    command(base, adapter, tmp_path / "merged", "--to", "llava", "--no-logits")
    found, wanted = (open_source(tmp_path / name) for name in ("converted", "merged"))
    for slot in wanted.parts:
        for name in wanted.part(slot).names:
            assert torch.equal(found.part(slot).get(name), wanted.part(slot).get(name)), name
    with pytest.raises(WeightError, match="was merged into .* already"):
        merge(tmp_path / "converted", [adapter], tmp_path / "twice")
    capsys.readouterr()
    assert main([*words, str(tmp_path / "again"), "--verify"]) == 1
    assert "--adapter merges an adapter into SRC" in capsys.readouterr().err


@pytest.mark.parametrize(("to", "outputs"), [("hf", "logits"), ("clip", "features")])
def test_one_part_of_it(whole, tmp_path, capsys, to, outputs):
    base, adapter, wrapped = whole
    command(base, adapter, tmp_path / "part", "--to", to)
    assert f"adapter-on {outputs}" in shown(capsys)
    merged = wrapped.merge_and_unload().model
    with torch.no_grad():
        if to == "hf":
            again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "part").eval()
            close(again.model(rows()).last_hidden_state, merged.language_model(rows()).last_hidden_state)
        else:
            pixels = torch.randn(1, 3, 28, 28)
            again = transformers.CLIPVisionModel.from_pretrained(tmp_path / "part").eval()
            close(again(pixels).last_hidden_state, merged.vision_tower(pixels).last_hidden_state)


def test_several_adapters_of_a_decoder_in_a_row(tmp_path, capsys):
    theirs = make("llama")
    save(theirs, "llama", tmp_path)
    first = adapted(theirs, tmp_path / "first", target_modules=["q_proj", "up_proj"])
    second = adapted(first.merge_and_unload(), tmp_path / "second", seed=5, target_modules=["q_proj", "o_proj"])
    words = [str(tmp_path / name) for name in ("hf", "first", "second")]
    assert main(["merge", *words, "--output", str(tmp_path / "both")]) == 0
    assert "max |d|" in shown(capsys)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "both").eval()
    with torch.no_grad():
        close(again(rows()).logits, second(rows()).logits)
    assert main(["merge", *words, "--output", str(tmp_path / "quiet"), "--no-logits"]) == 0
    assert "max |d|" not in capsys.readouterr().out
    assert main(["merge", *words[:2], "--output", str(tmp_path / "one"), "--no-logits"]) == 0
    assert main(["merge", str(tmp_path / "one"), words[2], "--output", str(tmp_path / "two"), "--no-logits"]) == 0
    assert set(json.loads((tmp_path / "two" / "merged_adapters.json").read_text()).values()) == {"first", "second"}


def test_a_difference_is_no_success(whole, tmp_path, capsys, monkeypatch):
    from mindspeed_mm.inference import compare_adapters

    figures = {"outputs": "logits", "positions": 3, "max": 0.5, "mean": 0.1, "top1": 0.5, "against": "ours"}
    monkeypatch.setattr(compare_adapters, "compare_merged", lambda *given: {"model": figures})
    words = ["merge", str(whole[0]), str(whole[1]), "--output", str(tmp_path / "out")]
    assert main(words) == 1
    assert "merged logits differ from those with the adapter on by 0.5" in capsys.readouterr().err


def test_new_tensors_and_another_layout(tmp_path):
    theirs = make("llama")
    save(theirs, "llama", tmp_path)
    sizes = {"0.weight": (48, 8), "0.bias": (48,), "2.weight": (48, 48), "2.bias": (48,)}
    torch.save({f"model.mm_projector.{name}": torch.ones(size) for name, size in sizes.items()}, tmp_path / "p.bin")
    with pytest.raises(WeightError, match="is new to .*Merge without --to, then convert"):
        merge(tmp_path / "hf", [tmp_path / "p.bin"], tmp_path / "out", to="clip")


def test_bases_without_what_is_adapted(tmp_path):
    model = llava_next(clip())
    base, original = save_llava(model, tmp_path / "base"), save_original(model, tmp_path / "original")
    adapted(model, tmp_path / "adapter", target_modules="all-linear")
    with pytest.raises(WeightError, match="it adapts the vision_encoder, which lies in"):
        merge(original, [tmp_path / "adapter"], tmp_path / "merged")
    tensors = load_file(base / "model.safetensors")
    kept = {name: each for name, each in tensors.items() if not ("vision_tower" in name and ".layers.2." in name)}
    assert len(kept) < len(tensors)
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightError, match=r"has no .*layers.2.*expected it there"):
        merge(base, [tmp_path / "adapter"], tmp_path / "merged")
