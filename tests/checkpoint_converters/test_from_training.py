"""Training checkpoints of several parallel layouts into every other layout."""

import dataclasses

import pytest

import mindspeed_mm as mm
from checkpoint_converters.checkpoint import source as checkpoint_source
from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import load_model_spec
from tests.checkpoint_converters.converter_helpers import assert_equal, our_tensors
from tests.helpers.golden_training import GoldenLayout, description, train_golden


def describe(monkeypatch, model):
    """What `mindspeed-mm train` writes into run.json, which the helper's bare driver does not."""
    original = checkpoint_source.read_checkpoint

    def described(path):
        checkpoint = original(path)
        return dataclasses.replace(checkpoint, run=checkpoint.run | {"extra": {"model": model, "data": {}}})

    monkeypatch.setattr(checkpoint_source, "read_checkpoint", described)


@pytest.mark.parametrize(
    "layout", [GoldenLayout(tensor=2, trained="c"), GoldenLayout(pipeline=2, trained="c", grouped=True)]
)
def test_a_checkpoint_goes_to_every_layout_of_whole_models(golden, ranks, tmp_path, monkeypatch, layout):
    save = tmp_path / "save"
    ranks(2).run(train_golden, golden, layout, str(save), "--exit-interval 1")
    with pytest.raises(CheckpointError, match="run.json does not describe the model"):
        mm.convert(save, tmp_path / "no", to="llava")
    describe(monkeypatch, description(golden, layout))
    for to in ("llava-hf", "llava", "mindspeed-mm"):
        mm.convert(save, tmp_path / to, to=to, tokenizer=golden / "models" / "vicuna")
    spec = load_model_spec(open_source(save).config["model"])
    expected = our_tensors(save, spec)
    assert_equal(our_tensors(tmp_path / "mindspeed-mm", spec), expected)
    assert_equal(our_tensors(tmp_path / "llava", spec), expected)
    rows = spec.text_decoder.language_vocab_size
    found = our_tensors(tmp_path / "llava-hf", spec)
    assert_equal({name: tensor[:rows] if len(tensor) > 1000 else tensor for name, tensor in found.items()}, expected)
