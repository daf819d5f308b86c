"""Greedy tokens equal transformers' from every layout that is written, and from training checkpoints."""

import dataclasses
import json

import pytest
from safetensors.torch import load_file

import mindspeed_mm as mm
from tests.helpers.golden_training import GoldenLayout, description, train_golden


def greedy(vlm, golden):
    """(found, expected) tokens of the reference's prompts."""
    cases = list(json.loads((golden / "expected" / "meta.json").read_text())["generation"].values())
    images = load_file(golden / "images" / "preprocessed.safetensors")
    found = vlm.generate(
        input_ids=[case["input_ids"] for case in cases],
        images=[images[f"{name}.pad"] for case in cases for name in case["images"]],
        max_new_tokens=24,
    )
    return found, [case["new_tokens_eos_stop"] for case in cases]


@pytest.mark.parametrize("source", ["llava_hf", "llava_original"])
@pytest.mark.parametrize("to", ["mindspeed-mm", "llava-hf", "llava"])
def test_converted(golden, tmp_path, source, to):
    mm.convert(golden / "models" / source, tmp_path / to, to=to)
    found, expected = greedy(mm.load(tmp_path / to, device="cpu"), golden)
    assert found == expected


@pytest.mark.parametrize("files", ["clip_hf", "clip_openai.pt"])
def test_parts_of_their_own(golden, tmp_path, files):
    """Vision encoder, projector and decoder come from three files of three layouts."""
    from tests.helpers.golden_model import model_json

    spec = tmp_path / "model.json"
    spec.write_text(json.dumps(model_json(golden, text_decoder="vicuna_bin", vision_encoder=files)))
    tools = {"tokenizer": golden / "tokenizer", "image_processor": golden / "models" / "clip_hf"}
    found, expected = greedy(mm.load(spec, device="cpu", **tools), golden)
    assert found == expected


def from_checkpoint(golden, save, model, tensor, pipeline):
    """(found, expected) of a training checkpoint, which the helper's bare driver does not describe."""
    from checkpoint_converters.checkpoint import source as checkpoint_source

    original, data = checkpoint_source.read_checkpoint, {"tokenizer": str(golden / "tokenizer")}

    def described(path):
        checkpoint = original(path)
        return dataclasses.replace(checkpoint, run=checkpoint.run | {"extra": {"model": model, "data": data}})

    checkpoint_source.read_checkpoint = described
    try:
        vlm = mm.load(
            save,
            device="cpu",
            tokenizer=golden / "tokenizer",
            image_processor=golden / "models" / "clip_hf",
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
        )
    finally:
        checkpoint_source.read_checkpoint = original
    return greedy(vlm, golden)


@pytest.mark.parametrize("layout", [GoldenLayout(tensor=2, trained="c"), GoldenLayout(pipeline=2, trained="c")])
def test_training_checkpoint(golden, ranks, tmp_path, layout):
    """The first step of this training has learning rate 0: its checkpoint holds the reference's weights."""
    save, model = tmp_path / "save", description(golden, layout)
    ranks(2).run(train_golden, golden, layout, str(save), "--exit-interval 1")
    for size, tensor, pipeline in ((1, 1, 1), (2, 2, 1), (2, 1, 2)):
        for found, expected in ranks(size).run(from_checkpoint, golden, save, model, tensor, pipeline):
            assert found == expected
