"""`mindspeed-mm train` goes on at another number of data-parallel ranks with exactly the samples that come next."""

import pytest

from tests.helpers.golden_training import records
from tests.parallel.test_command import describe_data, folder, train  # noqa: F401  folder is a fixture

SIZES = "--train-iters 6 --global-batch-size 4"


@pytest.mark.parametrize("packing", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "packed"])
@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)], ids=["DP1 to DP2", "DP2 to DP1"])
def test_the_next_samples_come(ranks, golden, folder, packing, first, second):  # noqa: F811
    """12 records in 6 steps of 4 rows: several epochs; the losses tell which rows were read."""
    describe_data(golden, folder, packing)
    place = str(folder)
    assert ranks(1).run(train, place, "whole", SIZES) == [0]
    assert set(ranks(first).run(train, place, "cut", f"{SIZES} --exit-interval 3 --async-save")) == {0}
    more = f"{SIZES} --load {folder}/cut --use-distributed-optimizer"
    assert set(ranks(second).run(train, place, "cut", more)) == {0}
    found, wanted = records(folder / "cut"), records(folder / "whole")
    for key in ("iteration", "consumed_samples", "samples", "supervised", "tokens"):
        assert [r[key] for r in found] == [r[key] for r in wanted], key
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in found] == pytest.approx([r[key] for r in wanted], rel=1e-5), key
