"""The order of samples depends on the seed alone, not on how it is split or where it is resumed."""

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_mm.data.sampler import EndlessBatchSampler, EpochOrder
from mindspeed_mm.errors import ConfigError


def batches(count, length=10, consumed=0, mbs=2, rank=0, dp=1, seed=1, shuffle=True):
    sampler = EndlessBatchSampler(
        EpochOrder(length, seed=seed, shuffle=shuffle),
        consumed_samples=consumed,
        micro_batch_size=mbs,
        dp_rank=rank,
        dp_size=dp,
    )
    return list(islice(sampler, count))


def stream(count, **options):
    return [index for batch in batches(count, mbs=1, **options) for index in batch]


@settings(max_examples=50, deadline=None)
@given(
    length=st.integers(1, 30),
    split=st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 3), (3, 4), (1, 12), (4, 1), (6, 2)]),
    consumed=st.integers(0, 70),
)
def test_every_split_of_a_global_batch_holds_the_same_samples(length, split, consumed):
    mbs, dp = split
    expected = stream(24, length=length, consumed=consumed)
    micro_batches = 12 // (mbs * dp)
    ranks = [batches(2 * micro_batches, length, consumed, mbs, rank, dp) for rank in range(dp)]
    for step in range(2):
        mine = slice(step * micro_batches, (step + 1) * micro_batches)
        found = [index for rank in ranks for batch in rank[mine] for index in batch]
        assert sorted(found) == sorted(expected[step * 12 : (step + 1) * 12])
    ordered = [index for group in zip(*ranks, strict=True) for batch in group for index in batch]
    assert ordered == expected


@given(consumed=st.integers(0, 60))
def test_resuming_equals_continuing(consumed):
    assert stream(100)[consumed:] == stream(100 - consumed, consumed=consumed)


def test_every_epoch_is_another_permutation():
    order = stream(30)
    epochs = [order[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order != stream(30, seed=2)
    assert stream(12, shuffle=False) == [*range(10), 0, 1]


def test_the_order_is_pinned():
    """A change of this order would silently change what a resumed run trains on."""
    assert stream(10, seed=1234) == [8, 9, 5, 0, 2, 6, 4, 7, 1, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "number of samples is 0, expected at least 1"),
        ({"consumed": -1}, "consumed_samples is -1"),
        ({"mbs": 0}, "micro_batch_size is 0"),
        ({"dp": 0}, "dp_size is 0"),
        ({"rank": 2, "dp": 2}, "dp_rank is 2, expected 0 to 1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_impossible_sizes(options, message):
    with pytest.raises(ConfigError, match=message):
        batches(1, **options)
