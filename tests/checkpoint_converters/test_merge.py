"""Partial weights into a copy of a base: what changes, what stays, what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_converters.convert import convert
from checkpoint_converters.merge import merge
from mindspeed_mm.cli.main import main
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.describe import describe_model
from mindspeed_mm.models.sources import open_source
from tests.checkpoint_converters.converter_helpers import assert_equal, tensors, write_llava

PEFT = "base_model.model."


@pytest.fixture
def base(golden, tmp_path):
    """A whole model in the liuhaotian layout, three .bin shards."""
    source = write_llava(tmp_path / "source", golden)
    convert(source, tmp_path / "base", to="llava", shard_size=60_000)
    assert len(list((tmp_path / "base").glob("pytorch_model-*.bin"))) > 2
    return tmp_path / "base"


def projector(prefix="model.mm_projector."):
    generator = torch.Generator().manual_seed(9)
    shapes = {"0.weight": (16, 8), "0.bias": (16,), "2.weight": (16, 16), "2.bias": (16,)}
    return {prefix + name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("prefix", ["model.mm_projector.", PEFT + "model.mm_projector.", "mm_projector.", ""])
def test_a_projector_takes_the_place_of_the_bases(base, tmp_path, prefix):
    torch.save(projector(prefix), tmp_path / "p.bin")
    before = content(base)
    done = merge(base, [tmp_path / "p.bin"], tmp_path / "out")
    assert len(done.replaced) == 4 and not done.added
    expected = tensors(base) | {("vision_projector", name): tensor for name, tensor in projector("").items()}
    assert_equal(tensors(tmp_path / "out"), expected)
    assert content(base) == before
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in base.iterdir()}


def test_non_lora_trainables_with_a_head_keep_the_bases_type(base, tmp_path):
    head = torch.randn(1003, 16)
    trained = projector(PEFT + "model.mm_projector.") | {PEFT + "lm_head.weight": head.bfloat16()}
    torch.save(trained, tmp_path / "non_lora_trainables.bin")
    done = merge(base, [tmp_path / "non_lora_trainables.bin"], tmp_path / "out")
    assert "lm_head.weight" in done.replaced
    part = open_source(tmp_path / "out").part("text_decoder")
    assert torch.equal(part.get("lm_head.weight"), head.bfloat16().float())


def test_a_projector_is_added_to_a_decoder(base, tmp_path):
    convert(base, tmp_path / "decoder", to="hf", shard_size=60_000)
    torch.save(projector(), tmp_path / "p.bin")
    done = merge(tmp_path / "decoder", [tmp_path / "p.bin"], tmp_path / "out")
    assert len(done.added) == 4
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(done.added) <= set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(tmp_path / "out").values())
    assert open_source(tmp_path / "out").layout == "llava"


def test_llavas_names_find_their_place_in_llava_hf(base, tmp_path):
    convert(base, tmp_path / "hf", to="llava-hf")
    head = torch.randn(1003, 16)
    save_file(projector() | {"lm_head.weight": head}, tmp_path / "p.safetensors")
    done = merge(tmp_path / "hf", [tmp_path / "p.safetensors"], tmp_path / "out")
    assert "multi_modal_projector.linear_2.bias" in done.replaced
    out = open_source(tmp_path / "out")
    assert torch.equal(out.part("vision_projector").get("linear_1.weight"), projector("")["0.weight"])
    assert torch.equal(out.part("text_decoder").get("lm_head.weight"), head)


def test_weights_in_a_second_format_do_not_stay_as_they_were(golden, tmp_path, caplog):
    base = write_llava(tmp_path / "source", golden)  # one model.safetensors
    convert(base, tmp_path / "bin", to="llava", shard_size=60_000)
    for path in (tmp_path / "bin").glob("pytorch_model*"):
        path.rename(base / path.name)
    torch.save(projector(), tmp_path / "p.bin")
    merge(base, [tmp_path / "p.bin"], tmp_path / "out")
    assert "pytorch_model.bin.index.json" in caplog.text
    weights = [path.name for path in (tmp_path / "out").iterdir() if "model" in path.name]
    assert sorted(weights) == ["model.safetensors", "tokenizer.model"]
    assert torch.equal(open_source(tmp_path / "out").part("vision_projector").get("0.bias"), projector("")["0.bias"])


def test_a_vision_encoder_beside_the_base_is_found_from_anywhere(base, tmp_path):
    (base / "vision_tower").rename(tmp_path / "vision_encoder")
    config = json.loads((base / "config.json").read_text()) | {"mm_vision_tower": "../vision_encoder"}
    (base / "config.json").write_text(json.dumps(config))
    torch.save(projector(), tmp_path / "p.bin")
    merge(base, [tmp_path / "p.bin"], tmp_path / "far" / "out")
    assert describe_model(open_source(tmp_path / "far" / "out")).vision_encoder.num_attention_heads == 2
    assert json.loads((base / "config.json").read_text()) == config


def test_a_vision_encoder_in_shards_stays_whole_and_is_not_changed_in_one_of_two_places(base, tmp_path):
    torch.save(projector(), tmp_path / "p.bin")
    convert(base, tmp_path / "small", to="llava", shard_size=5_000)
    merge(tmp_path / "small", [tmp_path / "p.bin"], tmp_path / "out")
    vision_encoders = [content(tmp_path / name / "vision_tower") for name in ("small", "out")]
    assert vision_encoders[0] == vision_encoders[1] and any(
        path.name.endswith(".index.json") for path in vision_encoders[0]
    )
    name = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"
    torch.save({name: torch.ones(8)}, tmp_path / "vision_encoder.bin")
    with pytest.raises(WeightError, match="changes the vision encoder, which .*vision_tower holds once more"):
        merge(base, [tmp_path / "vision_encoder.bin"], tmp_path / "no")
    convert(base, tmp_path / "hf", to="llava-hf")
    merge(tmp_path / "hf", [tmp_path / "vision_encoder.bin"], tmp_path / "tuned")
    part = open_source(tmp_path / "tuned").part("vision_encoder")
    assert torch.equal(part.get("embeddings.class_embedding"), torch.ones(8))


@pytest.mark.parametrize(
    ("partial", "message"),
    [
        ({"lm_head.weight": torch.zeros(7, 16)}, r"lm_head.weight has shape \[7, 16\]; expected \[1003, 16\]"),
        ({"model.post_norm.weight": torch.zeros(1)}, "tensor model.post_norm.weight has no place"),
        ({"model.post_decoder.weight": torch.zeros(1)}, "blocks.0.mlp.fc1.weight"),
        ({PEFT + "model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(1)}, "found LoRA adapters"),
        ({"lm_head.weight": torch.full((1003, 16), torch.nan)}, "lm_head.weight has 16048 NaN or Inf"),
        ({}, "found no partial weights"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(base, tmp_path, partial, message):
    torch.save(partial, tmp_path / "p.bin")
    with pytest.raises(WeightError, match=message):
        merge(base, [tmp_path / "p.bin"], tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_bases_and_targets_that_are_refused(base, golden, tmp_path):
    torch.save(projector(), tmp_path / "p.bin")
    with pytest.raises(WeightError, match="comes from .*p.bin; expected it once"):
        merge(base, [tmp_path / "p.bin", tmp_path / "p.bin"], tmp_path / "out")
    with pytest.raises(WeightError, match="is no folder; expected a base"):
        merge(tmp_path / "p.bin", [tmp_path / "p.bin"], tmp_path / "out")
    with pytest.raises(WeightError, match="lies in the base"):
        merge(base, [tmp_path / "p.bin"], base / "out")
    convert(base, tmp_path / "ours", to="mindspeed-mm")
    with pytest.raises(WeightError, match="has layout mindspeed-mm; expected hf, llava"):
        merge(tmp_path / "ours", [tmp_path / "p.bin"], tmp_path / "out")
    with pytest.raises(WeightError, match="projector ends with width 16; expected 96"):
        merge(golden / "models" / "vicuna", [tmp_path / "p.bin"], tmp_path / "out")


def test_the_command(base, tmp_path, capsys):
    torch.save(projector(), tmp_path / "p.bin")
    assert main(["merge", str(base), str(tmp_path / "p.bin"), "--output", str(tmp_path / "out"), "--json"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "4 tensors replaced, 0 added" in said[0] and len(json.loads(said[-1])["replaced"]) == 4
    assert main(["merge", str(base), str(tmp_path / "p.bin"), "--output", str(tmp_path / "out")]) == 1
    assert "exists; expected a new folder" in capsys.readouterr().err
