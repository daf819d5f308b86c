"""Batches of every kind at every layout: packed rows, and steps without an image."""

import pytest

from tests.helpers.golden_training import GoldenLayout, begin, full_tensors, records, train_golden, validate_golden
from tests.parallel.comparison import compare, names

LAYOUTS = {
    "one": GoldenLayout(),
    "TP2 SP": GoldenLayout(tensor=2, flags="--sequence-parallel"),
    "PP2": GoldenLayout(pipeline=2),
    "PP2 VPP2": GoldenLayout(pipeline=2, virtual=2),
    "CP2": GoldenLayout(context=2),
    "DP2": GoldenLayout(data=2, flags="--use-distributed-optimizer"),
}


@pytest.mark.parametrize("name", names(LAYOUTS, slow=("PP2",)))
def test_packed_rows_train_like_plain_ones(ranks, golden, single, tmp_path, name):
    layout = LAYOUTS[name]._replace(packed=True)
    ranks(layout.ranks).run(train_golden, golden, layout, str(tmp_path), "--no-save-optim")
    compare((records(tmp_path), full_tensors(tmp_path)), single("b"))


@pytest.fixture(scope="module")
def text_steps(ranks, golden, tmp_path_factory):
    """One process, every second step without images."""
    save = tmp_path_factory.mktemp("text-steps")
    ranks(1).run(train_golden, golden, GoldenLayout(text_steps=True, trained="c"), str(save))
    return records(save), full_tensors(save)


@pytest.mark.parametrize("name", names([name for name in LAYOUTS if name != "one"], slow=("PP2", "TP2 SP")))
def test_steps_without_images(ranks, golden, text_steps, tmp_path, name):
    layout = LAYOUTS[name]._replace(text_steps=True, trained="c")
    ranks(layout.ranks).run(train_golden, golden, layout, str(tmp_path), "--no-save-optim")
    compare((records(tmp_path), full_tensors(tmp_path)), text_steps)


def test_validation_at_every_layout(ranks, golden):
    (wanted,) = ranks(1).run(validate_golden, golden, GoldenLayout(), 3)
    for name in ("TP2 SP", "PP2 VPP2", "CP2", "DP2"):
        layout = LAYOUTS[name]
        for loss in ranks(layout.ranks).run(validate_golden, golden, layout, 3):
            assert loss == pytest.approx(wanted, rel=1e-6), name


def images_encoded(golden, layout):
    """How many images the vision encoder of this rank sees in the first micro-batch."""
    state, args, data, hooks = begin(golden, layout, "", 5)
    from megatron.driver import validation
    from mindspeed_mm.objectives.sft import OBJECTIVE

    seen = []
    state.modules[0].image_encoder.encoder.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    validation.evaluate(state, args, OBJECTIVE.forward_step, data, 1, hooks)
    return seen


@pytest.mark.parametrize(("micro_batch", "share"), [(4, [2]), (1, [1, 1, 1, 1])])
def test_context_parallel_ranks_share_the_images(ranks, golden, micro_batch, share):
    """Four rows with an image each; where there is one for two ranks, one of them gets a blank one."""
    assert ranks(2).run(images_encoded, golden, GoldenLayout(context=2, micro_batch=micro_batch)) == [share, share]
