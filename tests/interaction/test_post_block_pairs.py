"""Preference training of the post-interaction block: alone, beside adapters, at other layouts."""

import json
import math

import pytest
import torch

from tests.helpers.golden_training import full_tensors, records
from tests.helpers.tiny_pairs import LORA, train_pairs, write_pairs
from tests.interaction.post_block_helpers import write_block
from tests.parallel.test_command import LAYOUTS

STAGE_1 = "--freeze_backbone True --tune_post_interaction_block True --tune_lm_head False"
STAGE_2 = "--freeze_backbone True --tune_post_interaction_block True --tune_lm_head True"


@pytest.fixture
def place(golden, tmp_path):
    write_pairs(golden, tmp_path)
    model = json.loads((tmp_path / "model.json").read_text())
    block = {"ckpt_path": str(write_block(tmp_path / "block.pt"))}
    (tmp_path / "model.json").write_text(json.dumps(model | {"interaction": block}))
    return tmp_path


@pytest.mark.slow
def test_stages_at_other_layouts(ranks, golden, place):
    for stage, flags in (("stage_1", STAGE_1), ("adapters", f"{STAGE_2} {LORA}")):
        assert ranks(1).run(train_pairs, str(place), stage, flags) == [0]
        wanted = records(place / stage)
        assert wanted[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert wanted[0]["rewards/margins"] == wanted[0]["rewards/accuracies"] == 0
        assert wanted[-1]["loss"] != pytest.approx(math.log(2), abs=1e-6)
        layout = {"stage_1": "PP2", "adapters": "TP2 SP"}[stage]
        assert ranks(2).run(train_pairs, str(place), f"{stage}_2", f"{flags} {LAYOUTS[layout]}") == [0, 0]
        found = records(place / f"{stage}_2")
        for key in ("loss", "grad_norm", "rewards/margins"):
            assert [r[key] for r in found] == pytest.approx([r[key] for r in wanted], rel=1e-4, abs=1e-7), (stage, key)


@pytest.mark.slow
def test_a_stage_goes_on(ranks, place):
    """From the first values of the block, which are the reference, as any part that is trained."""
    assert ranks(1).run(train_pairs, str(place), "whole", STAGE_1) == [0]
    assert ranks(1).run(train_pairs, str(place), "parted", f"{STAGE_1} --train-iters 2 --exit-interval 2") == [0]
    assert ranks(1).run(train_pairs, str(place), "parted", f"{STAGE_1} --load {place}/parted") == [0]
    whole, parted = full_tensors(place / "whole"), full_tensors(place / "parted")
    moved = [name for name in whole if name.startswith("interaction.")]
    for name in moved:
        torch.testing.assert_close(parted[name], whole[name], atol=1e-6, rtol=1e-5)


def test_a_stage_becomes_weights(ranks, place):
    import mindspeed_mm as mm

    assert ranks(1).run(train_pairs, str(place), "whole", f"{STAGE_1} --train-iters 1") == [0]
    ids = torch.tensor([[1, *[-200] * 16, *range(20, 30)]])
    pixels = torch.randn(1, 3, 56, 56)
    wanted = mm.load(place / "whole", device="cpu").logits(ids, pixel_values=pixels)
    mm.convert(place / "whole", place / "llava", to="llava")
    torch.testing.assert_close(mm.load(place / "llava", device="cpu").logits(ids, pixel_values=pixels), wanted)
    # The block alone is what the second stage begins with.
    mm.convert(place / "whole", place / "block", to="post-block")
    model = json.loads((place / "model.json").read_text())
    model["interaction"] = {"ckpt_path": str(place / "block")}
    (place / "model.json").write_text(json.dumps(model))
    assert ranks(1).run(train_pairs, str(place), "second", f"{STAGE_2} --train-iters 1") == [0]
    assert records(place / "second")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
