"""Batches of every kind at every layout: packed rows, and steps without a picture."""

import pytest

from tests.helpers.golden_training import Layout, full_tensors, records, train_golden
from tests.parallel.comparison import compare

LAYOUTS = {
    "one": Layout(),
    "TP2 SP": Layout(tensor=2, flags="--sequence-parallel"),
    "PP2": Layout(pipeline=2),
    "PP2 VPP2": Layout(pipeline=2, virtual=2),
    "CP2": Layout(context=2),
    "DP2": Layout(data=2, flags="--use-distributed-optimizer"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_rows_train_like_plain_ones(ranks, golden, single, tmp_path, name):
    layout = LAYOUTS[name]._replace(packed=True)
    ranks(layout.ranks).run(train_golden, golden, layout, str(tmp_path))
    compare((records(tmp_path), full_tensors(tmp_path)), single("b"))


@pytest.fixture(scope="module")
def text_steps(ranks, golden, tmp_path_factory):
    """One process, every second step without pictures."""
    save = tmp_path_factory.mktemp("text-steps")
    ranks(1).run(train_golden, golden, Layout(text_steps=True, trained="c"), str(save))
    return records(save), full_tensors(save)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])
def test_steps_without_pictures(ranks, golden, text_steps, tmp_path, name):
    layout = LAYOUTS[name]._replace(text_steps=True, trained="c")
    ranks(layout.ranks).run(train_golden, golden, layout, str(tmp_path))
    compare((records(tmp_path), full_tensors(tmp_path)), text_steps)
