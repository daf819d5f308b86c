"""Checkpoints of the whole model: saved at one layout, loaded at another, and bit for bit at the same one."""

import pytest
import torch

from tests.helpers.golden_training import GoldenLayout, full_tensors, records, train_golden
from tests.parallel.comparison import compare, names

DISTRIBUTED = "--use-distributed-optimizer"
OVERLAP = f"{DISTRIBUTED} --overlap-grad-reduce --overlap-param-gather"
TP2 = GoldenLayout(tensor=2, flags=f"--sequence-parallel {DISTRIBUTED}")
PP2 = GoldenLayout(pipeline=2)
DP2 = GoldenLayout(data=2, flags=OVERLAP)
CP2 = GoldenLayout(context=2)
VPP2 = GoldenLayout(pipeline=2, virtual=2, flags=DISTRIBUTED)
UNEVEN = GoldenLayout(pipeline=2, decoder=(("pipeline_num_layers", [1, 3]),), flags=DISTRIBUTED)

MOVES = {
    "PP2 -> TP2 SP distributed": (PP2, TP2),
    "TP2 SP distributed -> PP2 uneven distributed": (TP2, UNEVEN),
    "PP2 uneven distributed -> DP2 distributed overlap": (UNEVEN, DP2),
    "DP2 distributed overlap -> CP2": (DP2, CP2),
    "CP2 -> one": (CP2, GoldenLayout(micro_batch=2)),
    "CP2 -> PP2 VPP2 distributed": (CP2, VPP2),
    "PP2 VPP2 distributed -> PP2 uneven distributed": (VPP2, UNEVEN),
    "one -> TP2 PP2": (GoldenLayout(), GoldenLayout(tensor=2, pipeline=2)),
}


SLOW_MOVES = (
    *("DP2 distributed overlap -> CP2", "PP2 -> TP2 SP distributed", "CP2 -> one"),
    "PP2 VPP2 distributed -> PP2 uneven distributed",
)


@pytest.mark.parametrize("name", names(MOVES, slow=SLOW_MOVES))
def test_a_run_goes_on_at_another_layout(ranks, golden, single, tmp_path, name):
    first, second = MOVES[name]
    save = str(tmp_path)
    ranks(first.ranks).run(train_golden, golden, first, save, "--exit-interval 3")
    ranks(second.ranks).run(train_golden, golden, second, save, f"--load {save}")
    compare((records(tmp_path), full_tensors(tmp_path)), single("b"))


SAME = {"PP2": PP2, "TP2": TP2, "CP2": CP2, "DP2": DP2, "PP2 uneven": UNEVEN, "PP2 VPP2": VPP2}


@pytest.mark.parametrize("name", names(SAME, slow=("PP2 uneven", "PP2", "CP2")))
def test_resumed_equals_uninterrupted_bit_for_bit(ranks, golden, tmp_path, name):
    layout = SAME[name]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ranks(2).run(train_golden, golden, layout, str(whole))
    ranks(2).run(train_golden, golden, layout, str(cut), "--exit-interval 3")
    ranks(2).run(train_golden, golden, layout, str(cut), f"--load {cut}")
    for key in ("loss", "grad_norm", "consumed_samples", "learning_rate"):
        assert [record[key] for record in records(cut)] == [record[key] for record in records(whole)]
    kept, found = full_tensors(whole), full_tensors(cut)
    assert kept.keys() == found.keys()
    assert all(torch.equal(kept[key], found[key]) for key in kept)


@pytest.mark.parametrize("virtual", [pytest.param(None, marks=pytest.mark.slow), 2], ids=["PP2", "PP2 VPP2"])
def test_stage_1_saves_the_projector_alone(ranks, golden, single, tmp_path, virtual):
    """The first stage trains the projector (in its first chunk), the second one nothing."""
    layout = GoldenLayout(pipeline=2, virtual=virtual, trained="a", flags=OVERLAP)
    save = str(tmp_path)
    ranks(2).run(train_golden, golden, layout, save, "--exit-interval 3")
    ranks(2).run(train_golden, golden, layout, save, f"--load {save}")
    compare((records(tmp_path), full_tensors(tmp_path)), single("a"))
    tensors = full_tensors(tmp_path)
    trained = sum(value.numel() for name, value in tensors.items() if "projector" in name)
    frozen = sum(value.numel() for value in tensors.values()) - trained
    written = sum(file.stat().st_size for file in (tmp_path / "iter_0000005").glob("*.distcp"))
    stored = sum(file.stat().st_size for file in (tmp_path / "frozen").glob("*/*.distcp"))
    assert 4 * 4 * trained <= written < 4 * 4 * trained + 40_000  # parameters, their copy and two moments, in float32
    assert stored >= 4 * frozen
    assert len(list((tmp_path / "frozen").iterdir())) == 1
