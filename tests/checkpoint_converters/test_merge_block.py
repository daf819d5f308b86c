"""The post-interaction block in a merge: the stages of the fork's replace_bin.py, its folders, and what is refused."""

import json
import re
import shutil

import pytest
import torch

import mindspeed_mm as mm
from checkpoint_converters.merge import merge
from mindspeed_mm.cli.main import main
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.describe import describe_model
from mindspeed_mm.models.sources import open_source
from tests.interaction.post_block_helpers import tensors, with_block, write_model

HEAD = "lm_head.weight"
STAGES = {0: (True, True), 1: (True, False), 2: (False, True)}
"""adds, head: the table of the guide."""


def content(folder):
    found = {}
    for path in sorted(folder.glob("pytorch_model-*.bin")):
        found |= torch.load(path, weights_only=True)
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    return found


def trained(path, *, prefix="post_interaction_block.", head=True, scale=1.0, **form):
    """A non_lora_trainables.bin in float16, of the block, and of the head and the projector where asked."""
    held = {prefix + name: (scale * tensor).half() for name, tensor in tensors(**form).items()}
    held |= {HEAD: torch.randn(1000, 96).half(), "model.mm_projector.0.bias": torch.ones(96).half()} if head else {}
    torch.save(held, path)
    return held


def replaced(stage, base, partial):
    """What replace_bin.py writes, in plain Python."""
    adds, head = STAGES[stage]
    result = {**partial, **base} if adds else dict(base)
    result |= {HEAD: partial[HEAD]} if head else {}
    return result | {name: tensor for name, tensor in partial.items() if "post_" in name}


@pytest.fixture
def base(golden, tmp_path):
    """A liuhaotian folder of two shards beside its vision encoder."""
    for name in ("llava_original", "clip_hf"):
        shutil.copytree(golden / "models" / name, tmp_path / name, copy_function=shutil.copyfile)
        (tmp_path / name).chmod(0o755)
    return tmp_path / "llava_original"


@pytest.mark.parametrize("stage", STAGES)
def test_stages(base, tmp_path, capsys, stage):
    if stage == 2:  # which goes on from a base with a block, under its former name
        trained(tmp_path / "first.bin", prefix="post_decoder.", head=False)
        merge(base, [tmp_path / "first.bin"], tmp_path / "base", tune_stage=1)
        base = tmp_path / "base"
    partial, before = trained(tmp_path / "second.bin", scale=2.0), content(base)
    files = {path: path.read_bytes() for path in base.iterdir()}
    line = ["merge", str(base), str(tmp_path / "second.bin"), "--output", str(tmp_path / "out")]
    assert main([*line, "--tune_stage", str(stage)]) == 0
    found, wanted = content(tmp_path / "out"), replaced(stage, before, partial)
    assert found.keys() == wanted.keys() and len(found) > len(partial)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    assert {path: path.read_bytes() for path in base.iterdir()} == files
    left = ["model.mm_projector.0.bias"] if stage != 1 else [HEAD, "model.mm_projector.0.bias"]
    assert f"--tune-stage {stage} leaves {', '.join(left)} as in the base" in capsys.readouterr().err


def test_the_result_computes_what_the_parts_do(golden, base, tmp_path):
    trained(tmp_path / "block.bin", head=False)
    assert len(merge(base, [tmp_path / "block.bin"], tmp_path / "out").added) == 16
    block = {"ckpt_path": str(tmp_path / "block.bin"), "doubled_residual": True}
    write_model(tmp_path, with_block(golden, **block))
    ids, pixels = torch.tensor([[1, *[-200] * 16, *range(20, 30)]]), torch.randn(1, 3, 56, 56)
    ours, parts = (mm.load(tmp_path / name, device="cpu") for name in ("out", "model.json"))
    assert ours.spec.interaction.doubled_residual
    torch.testing.assert_close(
        ours.logits(ids, pixel_values=pixels), parts.logits(ids, pixel_values=pixels), atol=2e-3, rtol=1e-3
    )


FORMS = {
    "mlp": {},
    "linear": {"align": "linear"},
    "after the projector": {"features": 96},
    "no cross-attention": {"cross": False},
    "transformer block": {"cross": False, "text": True, "depth": 2},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_the_forks_folders_are_seen_from_their_tensors(base, tmp_path, form):
    """Their config.json names none; those without cross-attention store what would align the image all the same."""
    made = FORMS[form]
    held = trained(tmp_path / "block.bin", head=False, **made)
    if not made.get("cross", True):
        unused = {name: tensor.half() for name, tensor in tensors().items() if name.startswith(("align.", "image_"))}
        held |= {f"post_interaction_block.{name}": tensor for name, tensor in unused.items()}
        torch.save(held, tmp_path / "block.bin")
    merge(base, [tmp_path / "block.bin"], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["interaction"]
    config |= {"model_type": "llava-post-interaction", "align_hidden_act": "gelu", "layer_norm_eps": 2e-5}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    spec = describe_model(open_source(tmp_path / "out")).interaction
    assert spec.doubled_residual and spec.layernorm_epsilon == 2e-5 and spec.num_layers == made.get("depth", 1)
    assert (spec.cross_attention, spec.self_attention) == (made.get("cross", True), made.get("text", False))
    assert spec.features == ("vision_projector" if made.get("features") else "vision_encoder")
    assert spec.align == made.get("align", "mlp")
    mm.convert(tmp_path / "out", tmp_path / "ours", to="mindspeed-mm")
    assert (tmp_path / "ours" / "post_block.pt").is_file()
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"align_hidden_act": "relu"}))
    with pytest.raises(WeightError, match='found align_hidden_act "relu"; expected "gelu"'):
        open_source(tmp_path / "out")


def test_a_form_beside_the_block_counts(base, tmp_path):
    """What our own runs write: the block as the identity at the start."""
    (tmp_path / "run").mkdir()
    trained(tmp_path / "run" / "block.bin", head=False)
    sizes = {"input_size": 64, "hidden_size": 96, "ffn_hidden_size": 176, "num_attention_heads": 6}
    (tmp_path / "run" / "config.json").write_text(json.dumps({"interaction": sizes}))
    merge(base, [tmp_path / "run" / "block.bin"], tmp_path / "out")
    assert not describe_model(open_source(tmp_path / "out")).interaction.doubled_residual
    other = {"interaction": sizes | {"doubled_residual": True}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(other))
    with pytest.raises(WeightError, match="its block has doubled_residual True, the one of .* False"):
        merge(tmp_path / "out", [tmp_path / "run" / "block.bin"], tmp_path / "again")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"interaction": sizes | {"hidden_size": 48}}))
    with pytest.raises(WeightError, match="the block has width 48; expected 96, that of"):
        merge(base, [tmp_path / "run" / "block.bin"], tmp_path / "again")


def cut(held):
    return {name: tensor for name, tensor in held.items() if not name.endswith("mlp.fc2.weight")}


def wide(held):
    name = "post_interaction_block.blocks.0.mlp.fc1.weight"
    return held | {name: torch.zeros(180, 96).half()}


REFUSED = {
    "no block": (0, lambda held: {HEAD: held[HEAD]}, "--tune-stage 0 replaces the post-interaction block, and the"),
    "no head": (0, lambda held: {n: t for n, t in held.items() if n != HEAD}, "the partial weights have no lm_head"),
    "stage 2 first": (2, dict, "--tune-stage 2 adds nothing, and the base has no post_interaction_block."),
    "incomplete": (1, cut, "blocks.0.mlp.fc2.weight"),
    "another width": (1, wide, "has shape [180, 96]; expected [176, 96] in a block of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(base, tmp_path, case):
    stage, change, words = REFUSED[case]
    torch.save(change(trained(tmp_path / "part.bin")), tmp_path / "part.bin")
    with pytest.raises(WeightError, match=re.escape(words)):
        merge(base, [tmp_path / "part.bin"], tmp_path / "out", tune_stage=stage)
    assert not (tmp_path / "out").exists()


def test_bases_that_cannot_take_it(golden, base, tmp_path):
    trained(tmp_path / "block.bin", head=False)
    with pytest.raises(WeightError, match="--tune-stage makes another folder of the base's layout"):
        merge(base, [tmp_path / "block.bin"], tmp_path / "out", to="llava-hf", tune_stage=1)
    with pytest.raises(WeightError, match="has no place in"):
        merge(golden / "models" / "llava_hf", [tmp_path / "block.bin"], tmp_path / "out")
    config = json.loads((base / "config.json").read_text())
    del config["mm_hidden_size"]
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightError, match="with a post-interaction block lacks mm_hidden_size"):
        merge(base, [tmp_path / "block.bin"], tmp_path / "out")
