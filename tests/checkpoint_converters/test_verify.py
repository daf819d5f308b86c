"""Comparing two sources: tensors under our names, logits against transformers, the exit code."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_converters.compare import compare
from checkpoint_converters.convert import convert, open_parts
from mindspeed_mm.cli.main import main
from mindspeed_mm.errors import WeightError
from tests.checkpoint_converters.converter_helpers import write_llava


@pytest.fixture
def source(golden, tmp_path):
    """A tiny whole model."""
    return write_llava(tmp_path / "source", golden)


def compared(a, b, **options):
    return {part.part: part for part in compare(open_parts(a), open_parts(b), **options)}


@pytest.mark.parametrize("to", ["llava-hf", "llava", "mindspeed-mm"])
def test_conversions_compare_equal(source, tmp_path, to):
    convert(source, tmp_path / "out", to=to)
    for part in compared(source, tmp_path / "out").values():
        assert part.equal == part.tensors and part.within(0.0) and part.worst is None


def test_another_type_compares_equal_after_rounding(source, tmp_path):
    convert(source, tmp_path / "out", to="llava", dtype="bf16")
    for part in compared(source, tmp_path / "out").values():
        assert part.rounded == part.tensors and part.within(0.0)


def test_half_types_compare_equal_after_rounding_in_both_orders(source, tmp_path):
    convert(source, tmp_path / "fp16", to="llava", dtype="fp16")
    convert(tmp_path / "fp16", tmp_path / "bf16", to="hf", dtype="bf16")
    for pair in (("fp16", "bf16"), ("bf16", "fp16")):
        part = compared(*(tmp_path / name for name in pair))["text_decoder"]
        assert part.equal + part.rounded == part.tensors and part.rounded > 5


def test_the_worst_tensor_is_named(source, tmp_path):
    convert(source, tmp_path / "out", to="hf")
    state = load_file(tmp_path / "out" / "model.safetensors")
    state["model.layers.1.self_attn.k_proj.weight"][0, 0] += 0.5
    state["model.norm.weight"][0] += 0.25
    save_file(state, tmp_path / "out" / "model.safetensors")
    part = compared(source, tmp_path / "out")["text_decoder"]
    assert part.worst == "decoder.layers.1.self_attention.linear_qkv.weight"
    assert part.max_difference == pytest.approx(0.5) and part.equal == part.tensors - 2
    assert part.within(0.6) and not part.within(0.4)


def test_nan_on_one_side_is_an_infinite_difference(source, tmp_path):
    convert(source, tmp_path / "out", to="hf")
    state = load_file(tmp_path / "out" / "model.safetensors")
    state["model.norm.weight"][0] = torch.nan
    save_file(state, tmp_path / "out" / "model.safetensors")
    assert compared(source, tmp_path / "out")["text_decoder"].max_difference == float("inf")


def test_an_archive_without_heads_is_compared_with_those_of_the_other_side(golden):
    models = golden / "models"
    part = compared(models / "clip_openai.pt", models / "clip_hf")["vision_encoder"]
    assert part.equal + part.rounded == part.tensors


def test_sources_without_a_common_part(golden):
    with pytest.raises(WeightError, match="expected a common part"):
        compared(golden / "models" / "vicuna", golden / "models" / "clip_hf")


def test_the_command_compares_logits_and_fails_over_tolerance(golden, tmp_path, capsys):
    a, b = golden / "models" / "llava_original", tmp_path / "out"
    image = str(golden / "images" / "src" / "landscape.png")
    assert main(["convert", str(a), str(b), "--to", "llava-hf", "--dtype", "fp32", "--verify", "--json"]) == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])["verify"]["logits"]
    assert done["against"] == "transformers" and done["max"] < 1e-4 and done["top1"] == 1.0
    assert main(["verify", str(a), str(b), "--images", image, "--prompts", "What is it?"]) == 0
    capsys.readouterr()
    state = load_file(b / "model.safetensors")
    state["multi_modal_projector.linear_1.bias"] += 1.0
    save_file(state, b / "model.safetensors")
    assert main(["verify", str(a), str(b), "--no-logits"]) == 1
    assert "vision_projector: encoder.linear_fc1.bias differs by 1" in capsys.readouterr().err
    assert main(["verify", str(a), str(b), "--atol", "1.1"]) == 1
    assert "logits differ by" in capsys.readouterr().err


def test_parts_that_one_side_lacks_are_named(golden, capsys):
    models = golden / "models"
    assert main(["verify", str(models / "llava_original"), str(models / "vicuna")]) == 0
    said = capsys.readouterr().out
    assert "vicuna does not hold it: vision_encoder, vision_projector" in said
    assert "text_decoder logits (24 positions, ours against transformers)" in said


@pytest.mark.parametrize("names", [("vicuna_bin", "vicuna"), ("clip_openai.pt", "clip_hf"), ("clip_hf", "llava_hf")])
def test_parts_compute_what_transformers_does(golden, capsys, names):
    assert main(["verify", *(str(golden / "models" / name) for name in names), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (figures,) = (result[kind] for kind in ("text_decoder", "vision_encoder") if kind in result)
    assert figures["against"] == "transformers" and figures["max"] < 1e-4


def test_parts_that_compute_another_thing_are_refused(golden, tmp_path, capsys):
    vision_encoder = golden / "models" / "clip_hf"
    convert(vision_encoder, tmp_path / "other", to="clip")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["hidden_act"] = "gelu"  # which no tensor shows
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    assert main(["verify", str(vision_encoder), str(tmp_path / "other")]) == 1
    assert "features differ by" in capsys.readouterr().err
    assert main(["verify", str(vision_encoder), str(tmp_path / "other"), "--no-logits"]) == 0


def test_transformers_computes_llava_hf_on_either_side_and_a_model_put_together(golden, tmp_path, capsys):
    models = golden / "models"
    a, b = str(models / "llava_hf"), str(models / "llava_original")
    assert main(["verify", a, b]) == 0
    assert "ours against transformers" in capsys.readouterr().out
    parts = ["--text-decoder", b, "--projector", b, "--vision-encoder", str(models / "clip_hf")]
    assert main(["convert", *parts, str(tmp_path / "out"), "--to", "llava-hf", "--verify"]) == 0
    assert "ours against transformers" in capsys.readouterr().out
