"""Gradient norm of each part in the log (megatron/driver/part_gradients.py)."""

import pytest
import torch

from tests.helpers.golden_training import GoldenLayout, begin, records, train_golden
from tests.parallel.comparison import names

PARTS = ("text_decoder", "vision_encoder", "vision_projector")
KEYS = [f"grad_norm/{part}" for part in PARTS]
FROZEN = (("freeze", True),)
LAYOUTS = {
    "TP2 SP": GoldenLayout(tensor=2, flags="--sequence-parallel"),
    "PP2": GoldenLayout(pipeline=2),
    "PP2, virtual stages": GoldenLayout(pipeline=2, virtual=2),
    "CP2": GoldenLayout(context=2),
    "DP2": GoldenLayout(data=2),
    "DP2, distributed optimizer": GoldenLayout(data=2, flags="--use-distributed-optimizer --overlap-grad-reduce"),
    "PP2, tied head": GoldenLayout(pipeline=2, grouped=True),
    "DP2, distributed optimizer, tied head": GoldenLayout(data=2, grouped=True, flags="--use-distributed-optimizer"),
}


def norms(ranks, golden, layout, folder, flags="", steps=2):
    ranks(layout.ranks).run(train_golden, golden, layout, str(folder), f"--no-save-optim {flags}", steps)
    return records(folder)


def add_up(found):
    for record in found:
        total = sum(value**2 for key, value in record.items() if key.startswith("grad_norm/")) ** 0.5
        assert total == pytest.approx(record["grad_norm"], rel=1e-5)


def measured(golden, layout):
    """The parts' norms of the first step, out of torch's own gradients in one process."""
    state, args, batches, _ = begin(golden, layout, "", 1)
    from megatron.driver import loop
    from mindspeed_mm.objectives.sft import OBJECTIVE

    loop.forward_backward(state, args, OBJECTIVE.forward_step, [next(batches) for _ in range(4)])
    return {
        f"grad_norm/{name}": torch.cat([value.main_grad.flatten().double() for value in part.parameters()])
        .norm()
        .item()
        for name, part in state.modules[0].parts().items()
    }


@pytest.fixture(scope="module")
def single(ranks, golden, tmp_path_factory):
    return norms(ranks, golden, GoldenLayout(), tmp_path_factory.mktemp("single"), "--clip-grad 0.01")


def test_one_rank(ranks, golden, single):
    add_up(single)
    (wanted,) = ranks(1).run(measured, golden, GoldenLayout())
    assert sorted(wanted) == KEYS
    assert {key: single[0][key] for key in KEYS} == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", names(LAYOUTS, slow=("PP2", "DP2", "DP2, distributed optimizer, tied head")))
def test_squares_add_up_at_every_layout(ranks, golden, single, tmp_path, name):
    layout = LAYOUTS[name]
    found = norms(ranks, golden, layout, tmp_path, "--clip-grad 0.01")
    assert [sorted(key for key in record if "grad_norm/" in key) for record in found] == [KEYS, KEYS]
    add_up(found)
    if not layout.grouped:
        for ours, wanted in zip(found, single, strict=True):
            assert {key: ours[key] for key in KEYS} == pytest.approx({key: wanted[key] for key in KEYS}, rel=2e-4)


def test_a_frozen_part_has_none(ranks, golden, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    layout = GoldenLayout(pipeline=2, decoder=FROZEN, vision_encoder=FROZEN)
    (record,) = norms(ranks, golden, layout, tmp_path, f"--tensorboard-dir {tmp_path / 'board'}", 1)
    assert [key for key in record if "grad_norm/" in key] == ["grad_norm/vision_projector"]
    assert record["grad_norm/vision_projector"] == pytest.approx(record["grad_norm"], rel=1e-5)
    scalars = EventAccumulator(str(tmp_path / "board")).Reload().Scalars("grad_norm/vision_projector")
    assert [event.value for event in scalars] == [pytest.approx(record["grad_norm"], rel=1e-5)]


def test_half_precision(ranks, golden, tmp_path):
    """Gradients are told without the loss scale; a skipped step has no norms."""
    flags = "--fp16 --initial-loss-scale 256"
    found = norms(ranks, golden, GoldenLayout(), tmp_path / "whole", flags, 1)
    add_up(found)
    flags = "--fp16 --initial-loss-scale 1e30 --hysteresis 1"
    (skipped,) = norms(ranks, golden, GoldenLayout(), tmp_path / "skipped", flags, 1)
    assert [skipped[key] for key in ("grad_norm", *KEYS)] == [None] * 4
