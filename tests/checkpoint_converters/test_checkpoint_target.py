"""Weights written as a training checkpoint: what training, inference and conversions make of it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import mindspeed_mm as mm
from checkpoint_converters.stream import Runner
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import load_model_spec
from tests.checkpoint_converters.converter_helpers import assert_equal, our_tensors, write_llava
from tests.helpers.golden_training import GoldenLayout, description, records, train_golden


@pytest.fixture
def saved(golden, tmp_path):
    """The golden model as a checkpoint."""
    mm.convert(golden / "models" / "llava_original", tmp_path / "saved", to="checkpoint")
    return tmp_path / "saved"


def test_it_is_what_a_run_leaves(saved, golden):
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert (saved / "tokenizer" / "tokenizer.model").is_file()
    source = open_source(saved)
    assert source.layout == "checkpoint" and source.part("vision_encoder").config["num_layers"] == 4
    spec = load_model_spec(source.config["model"])
    assert_equal(our_tensors(saved, spec), our_tensors(golden / "models" / "llava_original", spec))


def test_a_model_is_loaded_from_it(saved, golden):
    ids, pixels = torch.tensor([[1, *[-200] * 16, 9, 8, 7]]), torch.randn(1, 3, 56, 56)
    found, expected = (mm.load(path, device="cpu") for path in (saved, golden / "models" / "llava_original"))
    assert torch.equal(found.logits(ids, None, pixels), expected.logits(ids, None, pixels))
    assert found.tokenizer.encode("A dog") == expected.tokenizer.encode("A dog") and found.pad == expected.pad


@pytest.mark.parametrize(
    "layout", [pytest.param(GoldenLayout(), marks=pytest.mark.slow), GoldenLayout(tensor=2), GoldenLayout(pipeline=2)]
)
def test_training_starts_from_it_at_any_layout(golden, saved, ranks, tmp_path, layout):
    ranks(layout.ranks).run(train_golden, golden, layout, str(tmp_path / "run"), f"--load {saved} --exit-interval 1")
    ranks(layout.ranks).run(train_golden, golden, layout, str(tmp_path / "plain"), "--exit-interval 1")
    assert records(tmp_path / "run")[0]["loss"] == records(tmp_path / "plain")[0]["loss"]


def test_bf16_tied_and_grouped_go_there_and_back(golden, tmp_path):
    source = write_llava(tmp_path / "source", golden, text={"tie_word_embeddings": True}, dtype=torch.bfloat16)
    mm.convert(source, tmp_path / "saved", to="checkpoint")
    mm.convert(tmp_path / "saved", tmp_path / "back", to="llava")
    spec = load_model_spec(open_source(tmp_path / "saved").config["model"])
    assert spec.text_decoder.share_embeddings_and_output_weights
    assert_equal(our_tensors(tmp_path / "back", spec), our_tensors(source, spec))
    with pytest.raises(WeightError, match="saved exists; expected a new folder"):
        mm.convert(source, tmp_path / "saved", to="checkpoint")
    mm.convert(source, tmp_path / "saved", to="checkpoint", overwrite=True)


def test_a_part_alone_is_no_checkpoint(golden, tmp_path):
    with pytest.raises(WeightError, match="expected a vision_encoder"):
        mm.convert(golden / "models" / "vicuna", tmp_path / "out", to="checkpoint")


def test_a_full_disk_and_damaged_weights_are_told_as_everywhere(golden, tmp_path, monkeypatch):
    source = write_llava(tmp_path / "source", golden)
    state = load_file(source / "model.safetensors")
    state["model.norm.weight"][3] = torch.inf
    save_file(state, source / "model.safetensors")
    with pytest.raises(WeightError, match="final_layernorm.weight has 1 NaN or Inf of 16 values"):
        mm.convert(source, tmp_path / "out", to="checkpoint")

    def fill(_self, _job):  # torch's zip writer says this of a full disk
        raise RuntimeError("unexpected pos 704 vs 598") from OSError(28, "No space left on device")

    monkeypatch.setattr(Runner, "make", fill)
    with pytest.raises(WeightError, match="cannot write .*out: No space left on device"):
        mm.convert(source, tmp_path / "out", to="checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


FOUR = tuple(
    {"num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 12, "ckpt_path": None, "fresh": True}.items()
)


def test_a_checkpoint_of_four_tensor_parallel_ranks_is_a_source(golden, ranks, tmp_path):
    layout = GoldenLayout(tensor=4, trained="c", decoder=FOUR)
    ranks(4).run(train_golden, golden, layout, str(tmp_path / "save"), "--exit-interval 1")
    (folder,) = (tmp_path / "save").glob("iter_*")
    run = json.loads((folder / "run.json").read_text())
    run["extra"] = {"model": description(golden, layout), "data": {}}  # what the command adds
    (folder / "run.json").write_text(json.dumps(run))
    sums = json.loads((folder / "checksums.json").read_text())
    from megatron.driver.checkpoint.integrity import digest

    (folder / "checksums.json").write_text(json.dumps(sums | {"run.json": digest(folder / "run.json")}))
    spec = load_model_spec(run["extra"]["model"])
    expected = our_tensors(tmp_path / "save", spec)
    for to in ("llava", "mindspeed-mm", "checkpoint"):
        mm.convert(tmp_path / "save", tmp_path / to, to=to, tokenizer=golden / "models" / "vicuna")
        assert_equal(our_tensors(tmp_path / to, spec), expected)
