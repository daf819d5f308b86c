"""Weights of the post-interaction block in and out, generation from a cache, and answers that do not depend on it."""

import json

import pytest
import torch
from PIL import Image

import mindspeed_mm as mm
from mindspeed_mm.cli.main import main
from mindspeed_mm.errors import WeightError
from tests.evaluation.evaluation_helpers import image_cell, write_table
from tests.interaction.post_block_helpers import tensors, with_block, write_block, write_model

FORMS = {
    "usual": {},
    "doubled": {"doubled_residual": True, "num_layers": 2},
    "projector": {"features": "vision_projector"},
    "transformer block": {"cross_attention": False, "self_attention": True, "num_layers": 2},
}


@pytest.fixture(scope="module", params=FORMS)
def model(golden, tmp_path_factory, request):
    """A folder of our own files with a block in it."""
    place, block = tmp_path_factory.mktemp("block"), FORMS[request.param]
    width = 96 if block.get("features") else 64
    text = block.get("self_attention", False)
    path = write_block(place / "block.pt", depth=block.get("num_layers", 1), features=width, cross=not text, text=text)
    write_model(place, with_block(golden, ckpt_path=str(path), **block))
    files = {"tokenizer": golden / "tokenizer", "image_processor": golden / "models" / "clip_hf"}
    mm.convert(place / "model.json", place / "ours", to="mindspeed-mm", **files)
    return place / "ours"


def prompts():
    """Rows of unequal lengths with one image, two and none; expanded ids and the images."""
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(5, 900, (90,), generator=generator).tolist()
    images = torch.randn(3, 3, 56, 56, generator=generator)
    shown = [-200] * 16
    return [[*words[:4], *shown, *words[4:9]], [*shown, *words[9:30], *shown, *words[30:33]], words[40:52]], images


def recomputed(vlm, prompt, images, tokens):
    """Greedy tokens, each from a pass over everything before it."""
    ids = list(prompt)
    for _ in range(tokens):
        given = {"pixel_values": images} if len(images) else {}
        ids.append(int(vlm.logits(torch.tensor([ids]), **given)[0, -1].argmax()))
    return ids[len(prompt) :]


def test_cached_decoding_equals_recomputing(model):
    vlm = mm.load(model, device="cpu")
    rows, images = prompts()
    own = [images[:1], images[1:], images[:0]]
    wanted = [recomputed(vlm, row, shown, 6) for row, shown in zip(rows, own, strict=True)]
    options = {"max_new_tokens": 6, "eos_token_id": -1}
    found = vlm.generate(input_ids=rows, images=images, **options)
    assert [row[:6] for row in found] == wanted
    # A prompt that goes on from another one's cache sees that one's images, too.
    longer = rows[1] + wanted[1] + [7, 8, 9]
    again = vlm.generate(input_ids=[rows[1], longer], images=torch.cat((images[1:], images[1:])), **options)
    assert again[1] == recomputed(vlm, longer, images[1:], 6)


def test_beams_and_samples(model):
    vlm = mm.load(model, device="cpu")
    rows, images = prompts()
    together = vlm.generate(input_ids=rows, images=images, num_beams=3, max_new_tokens=5)
    alone = vlm.generate(input_ids=[rows[1]], images=images[1:], num_beams=3, max_new_tokens=5)
    assert together[1] == alone[0]


def test_every_layout_and_back(model, tmp_path):
    vlm = mm.load(model, device="cpu")
    rows, images = prompts()
    ids = torch.tensor(rows[:1])
    wanted = vlm.logits(ids, pixel_values=images[:1])
    for to in ("llava", "checkpoint", "mindspeed-mm"):
        mm.convert(model, tmp_path / to, to=to)
        found = mm.load(tmp_path / to, device="cpu")
        torch.testing.assert_close(found.logits(ids, pixel_values=images[:1]), wanted, atol=1e-6, rtol=0)
    mm.convert(tmp_path / "llava", tmp_path / "alone", to="post-block")
    names = torch.load(tmp_path / "alone" / "post_block.bin", weights_only=True)
    assert "post_interaction_block.blocks.0.mlp.fc1.weight" in names
    block = json.loads((tmp_path / "alone" / "config.json").read_text())["interaction"]
    assert block.get("doubled_residual", False) == vlm.spec.interaction.doubled_residual
    with pytest.raises(WeightError, match="has a post-interaction block, for which layout llava-hf of llava has no"):
        mm.convert(model, tmp_path / "hf", to="llava-hf")


def test_commands_take_a_model_with_a_block(golden, tmp_path, capsys):
    """A question in words, and those of a benchmark."""
    path = write_block(tmp_path / "block.pt")
    write_model(tmp_path, with_block(golden, ckpt_path=str(path)))
    files = {"tokenizer": golden / "tokenizer", "image_processor": golden / "models" / "clip_hf"}
    mm.convert(tmp_path / "model.json", tmp_path / "ours", to="mindspeed-mm", **files)
    Image.new("RGB", (60, 40), "red").save(tmp_path / "red.png")
    asked = ["--model", str(tmp_path / "ours"), "--device", "cpu", "--max-new-tokens", "3"]
    assert main(["infer", *asked, "--prompt", "What is it?", "--image", str(tmp_path / "red.png"), "--json"]) == 0
    cells = {"image": image_cell(), "question": "Is there a dog?"}
    rows = [cells | {"index": str(n), "answer": ("No", "Yes")[n % 2], "category": "random"} for n in range(2)]
    write_table(tmp_path / "POPE.tsv", rows)
    table = ["--dataset-path", str(tmp_path / "POPE.tsv"), "--evaluation-dataset", "pope", "--accept-table"]
    assert main(["evaluate", *asked, *table, "--result-output-path", str(tmp_path / "answers"), "--json"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1])["files"]


def test_names_of_the_original(golden, tmp_path):
    """The names of its checkpoints before and after it was renamed, inside its non_lora_trainables.bin, too."""
    from mindspeed_mm.models.sources import open_source

    own = tensors()
    for prefix in ("post_decoder.", "model.post_decoder.", "base_model.model.post_interaction_block."):
        torch.save({prefix + name: tensor for name, tensor in own.items()}, tmp_path / "block.bin")
        part = open_source(tmp_path / "block.bin").part("interaction")
        torch.testing.assert_close(part.get("image_norm.weight"), own["image_norm.weight"])
    with pytest.raises(WeightError, match="expected a interaction"):
        open_source(golden / "models" / "llava_original").part("interaction")
