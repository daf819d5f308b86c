"""All eight golden steps of transformers, with the final weights, at parallel layouts."""

import pytest

from tests.helpers.golden_training import GoldenLayout, full_tensors, records, train_golden
from tests.parallel.comparison import compare_final_with_transformers, compare_with_transformers, names

GOLDEN_STEPS = 8
LAYOUTS = {
    "TP2 SP": GoldenLayout(tensor=2, flags="--sequence-parallel"),
    "PP2": GoldenLayout(pipeline=2),
    "PP2 VPP2, projector only": GoldenLayout(pipeline=2, virtual=2, trained="a"),
    "CP2": GoldenLayout(context=2),
    "CP2, clipped": GoldenLayout(context=2, trained="c"),
}


@pytest.mark.parametrize("name", names(LAYOUTS, slow=("PP2 VPP2, projector only", "CP2, clipped")))
def test_trajectory_and_final_weights_equal_transformers(ranks, golden, tmp_path, name):
    layout = LAYOUTS[name]
    ranks(2).run(train_golden, golden, layout, str(tmp_path), "", GOLDEN_STEPS)
    found = records(tmp_path)
    assert len(found) == GOLDEN_STEPS
    compare_with_transformers(golden, found, layout.trained)
    compare_final_with_transformers(golden, full_tensors(tmp_path), layout.trained)
