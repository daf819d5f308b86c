"""What the runs at parallel layouts are compared with."""

import pytest

from tests.helpers.golden_training import GoldenLayout, full_tensors, records, train_golden


@pytest.fixture(scope="session")
def single(ranks, golden, tmp_path_factory):
    """mode -> (records, tensors) of one process with micro-batches of one row."""
    known = {}

    def run(mode):
        if mode not in known:
            save = tmp_path_factory.mktemp(f"single-{mode}")
            ranks(1).run(train_golden, golden, GoldenLayout(trained=mode), str(save), "--no-save-optim")
            known[mode] = records(save), full_tensors(save)
        return known[mode]

    return run
