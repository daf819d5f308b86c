"""The recipe of the post-interaction block: launcher and files, and what is planned and logged of the block."""

import json
import subprocess

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.driver import test_launchers
from tests.driver.test_launchers import ROOT, launch, train_flags  # noqa: F401  a fixture
from tests.interaction.post_block_helpers import with_block

FOLDER = ROOT / "examples" / "hallucination"
SIZES = {"input_size": 1024, "hidden_size": 4096, "ffn_hidden_size": 11008, "num_attention_heads": 32}
"""What is taken from the decoder and the encoder."""
STAGE_FLAGS = ("--freeze_backbone", "--tune_mm_mlp_adapter", "--tune_post_interaction_block", "--tune_lm_head")


def given(told):
    """Flags of the stage that the launcher adds."""
    words = told["arguments"]
    return [words[words.index(name) + 1] for name in STAGE_FLAGS]


def without(told):
    """The rest, which the driver and the common flags read."""
    words = list(told["arguments"])
    for name in STAGE_FLAGS:
        place = words.index(name)
        del words[place : place + 2]
    return told | {"arguments": words}


def test_launcher_of_both_stages(launch, monkeypatch):  # noqa: F811
    from mindspeed_mm.config.inherit import read_config
    from mindspeed_mm.config.trained_parts import TrainedParts
    from mindspeed_mm.models.spec import load_model_spec

    monkeypatch.setitem(test_launchers.SCRIPTS, "post_block", FOLDER / "post_block.sh")
    for stage, head in (("1", False), ("2", True)):
        told = launch("post_block", STAGE=stage)
        assert given(told) == ["True", "False", "True", str(head)]
        namespace, args = train_flags(without(told), 4)
        assert (args.lr, args.micro_batch_size, args.num_micro_batches, args.train_iters) == (5e-7, 2, 16, 39)
        assert args.save == args.load == f"save_dir_post_block_{stage}"
        model = read_config(ROOT / namespace.mm_model)
        model["interaction"] |= SIZES
        flags = TrainedParts(True, False, None, head, True)
        spec = load_model_spec(flags.applied(model))
        assert {slot: part.trains for slot, part in spec.part_specs().items()} == {
            "text_decoder": head,
            "vision_encoder": False,
            "vision_projector": False,
            "interaction": True,
        }
        assert load_model_spec(model).interaction.trains  # without the flags, too
        assert spec.interaction.ckpt_path == (None if stage == "1" else "save_dir_post_block_1")
    found = subprocess.run(
        ["bash", FOLDER / "post_block.sh"], env={"STAGE": "3", "PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert found.returncode == 2 and "STAGE is 3; expected 1 (the block) or 2" in found.stderr


def test_parameters_of_the_guide():
    """Its block has about 213.7 million values."""
    from mindspeed_mm.models.interaction.post_block import PART

    model = json.loads((FOLDER / "model_post_block.json").read_text())
    shapes = PART.shapes(PART.Spec(**model["interaction"], **SIZES)).values()
    assert sum(torch.Size(shape).numel() for shape in shapes) == pytest.approx(213.7e6, rel=1e-3)


TEXT = {"cross_attention": False, "self_attention": True, "num_layers": 2}


@pytest.mark.parametrize("block", [{}, {"align": "linear", "num_layers": 2}, {"cross_attention": False}, TEXT], ids=str)
def test_operations_equal_torchs_count(golden, block, monkeypatch):
    from mindspeed_mm.platform import get_platform, host_products

    platform = get_platform("cpu")
    monkeypatch.setattr(host_products, "choose", lambda *_: host_products.PLAIN)  # torch does not count oneDNN's
    from mindspeed_mm.models.complete import read_model
    from mindspeed_mm.models.interaction_memory import Memory
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.platform.distributed import init_single_process

    if not torch.distributed.is_initialized():
        init_single_process(platform)
    spec = read_model(with_block(golden, **block)).interaction
    from mindspeed_mm.models.kit.post_block import PostBlock

    built = PostBlock(spec, Runtime())
    seen = torch.tensor([[0, 16]] * 7 + [[16, 32]] * 7)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        memory = Memory(torch.randn(32, 64), seen)
        if spec.self_attention:
            built.over_text(torch.randn(9, 2, 96), memory.text)
        else:
            built(torch.randn(14, 96), memory)
    products = spec.head_products(14, 32, [9, 9])
    # torch's kernel computes the half of the scores that a causal mask hides.
    hidden = 2 * 2 * 9 * 9 * 96 * spec.num_layers if spec.self_attention else 0
    assert sum(2 * p.rows * p.inputs * p.outputs for p in products) == counter.get_total_flops() - hidden


def test_the_plan_counts_the_block(golden):
    from mindspeed_mm.models.complete import read_model
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.planning.activations import head
    from mindspeed_mm.planning.duration import stage_flops
    from mindspeed_mm.planning.job import PlannedRow, TrainingJob
    from mindspeed_mm.planning.parameters import part_parameters, stage_parameters

    def job(stages=2, **block):
        spec = read_model(with_block(golden, **block))
        row = PlannedRow(positions=64, lengths=(64.0,), supervised=8.0)
        return TrainingJob(spec=spec, runtime=Runtime(pipeline_model_parallel_size=stages), row=row)

    made = job()
    assert part_parameters(made, "interaction", 0).total == 0
    own = part_parameters(made, "interaction", 1)
    assert own.total == own.trained == stage_parameters(made, 1).trained > 0
    assert stage_parameters(made, 0).trained == 0
    assert head(made).kept > 0 == head(job(freeze=True)).kept
    assert stage_flops(made, 1) > stage_flops(job(freeze=True), 1)
    assert stage_flops(made, 0) == stage_flops(job(freeze=True), 0)
