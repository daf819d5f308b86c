"""Mixes of sets: the sequences of `datasets`, nested mixes, one order on every rank and after a resume, bad input."""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from data_helpers import make_record
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_mm.data.build import build_loader, build_order
from mindspeed_mm.data.config import DataloaderParam
from mindspeed_mm.data.mixing import Mix, interleaved, mixed_indices, shuffled, subset
from mindspeed_mm.errors import ConfigError
from tests.helpers.media import dataset_of

SIZES, NAMES = (3, 4, 5), ("a", None, "c")


def mixed(tree, sizes=SIZES, names=NAMES):
    return mixed_indices(Mix.model_validate_json(json.dumps(tree)), sizes, names).tolist()


def test_turns_are_those_of_the_facts():
    turns = [0, 3, 7, 1, 4, 8, 2, 5, 9]
    assert interleaved(SIZES).tolist() == turns
    assert interleaved(SIZES, stop="all_exhausted").tolist() == [*turns, 0, 6, 10, 1, 3, 11]


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40) | st.integers(900, 1100), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    stop=st.sampled_from(["first_exhausted", "all_exhausted"]),
    shares=st.none() | st.lists(st.integers(1, 9), min_size=4, max_size=4),
)
def test_interleaved_sets_equal_those_of_datasets(sizes, seed, stop, shares):
    import datasets as library  # comes with trl; takes seconds, so not at the top

    starts = np.cumsum([0, *sizes])
    sets = [library.Dataset.from_dict({"n": list(range(a, b))}) for a, b in zip(starts, starts[1:], strict=False)]
    probabilities = shares and [share / sum(shares[: len(sizes)]) for share in shares[: len(sizes)]]
    expected = library.interleave_datasets(sets, probabilities=probabilities, seed=seed, stopping_strategy=stop)
    assert interleaved(sizes, probabilities, seed=seed, stop=stop).tolist() == list(expected["n"])


def test_a_part_that_is_never_drawn():
    assert set(interleaved(SIZES, [0, 0.5, 0.5], seed=1).tolist()) <= set(range(3, 12))


def test_parts_of_sets_and_shuffled_portions():
    assert subset(10, 0.35, shuffle=False).tolist() == [0, 1, 2]
    drawn = subset(10, 0.5, seed=3).tolist()
    assert len(set(drawn)) == 5 and drawn == subset(10, 0.5, seed=3).tolist() != subset(10, 0.5, seed=4).tolist()
    counts = Counter(shuffled(6, 2.5, seed=1).tolist())
    assert sum(counts.values()) == 15 and max(counts.values()) <= 3
    assert sorted(shuffled(6).tolist()) == list(range(6)) != shuffled(6).tolist()


def test_mixes_inside_mixes():
    tree = {"interleave": [{"concat": ["c", 0]}, {"subset": 1, "portion": 0.5, "shuffle": False}]}
    assert mixed(tree) == [7, 3, 8, 4]
    assert mixed({"concat": [2, 0, 1]}) == [*range(7, 12), *range(7)]
    assert len(mixed({"concat": [1, {"shuffled_concat": ["a", "c"], "portion": 1.5}]})) == 4 + 12
    uniform = {"interleave": ["a", 1, "c"], "probabilities": [0.2, 0.3, 0.5], "stopping_strategy": "all_exhausted"}
    assert (
        mixed(uniform)
        == mixed(uniform | {"seed": 42})
        == interleaved(SIZES, [0.2, 0.3, 0.5], stop="all_exhausted").tolist()
    )
    assert set(mixed(uniform)) == set(range(12))


@pytest.fixture
def two_sets(make_config, tmp_path):
    """make(mixing, **fields) -> DataConfig over the set "a" of 9 records and another one of 5."""
    for name, start, count in (("a", 0, 9), ("b", 50, 5)):
        (tmp_path / f"{name}.json").write_text(json.dumps([make_record(start + i) for i in range(count)]))
    sets = [{"data_path": str(tmp_path / f"{name}.json")} for name in "ab"]

    def make(mixing, first=None, second=None):
        both = [sets[0] | {"name": "a"} | (first or {}), sets[1] | (second or {})]
        return make_config([], basic_parameters=both, mixing=mixing)

    return make


def test_one_order_on_ranks_workers_and_after_a_resume(two_sets, tokenizer):
    mixing = {"interleave": ["a", 1], "probabilities": [0.3, 0.7], "stopping_strategy": "all_exhausted"}
    dataset = dataset_of(two_sets(mixing), tokenizer, 4, 200)
    epoch = interleaved([9, 5], [0.3, 0.7], stop="all_exhausted")
    assert dataset.epoch.tolist() == epoch.tolist() and dataset.epoch_samples == len(epoch)

    def ids(consumed, count, rank=0, ranks=1, mbs=4, workers=0, **options):
        loader = build_loader(
            dataset,
            consumed_samples=consumed,
            micro_batch_size=mbs,
            dp_rank=rank,
            dp_size=ranks,
            seed=1,
            num_workers=workers,
            pad_token_id=0,
            epoch=dataset.epoch,
            options=DataloaderParam(**options),
        )
        batches = [batch.sample_ids for batch in islice(loader, count)]
        loader.close()
        return batches

    whole = [sample for batch in ids(0, 10) for sample in batch]
    first, second = ids(8, 8, 0, 2, 2, workers=1), ids(8, 8, 1, 2, 2)
    assert [sample for pair in zip(first, second, strict=True) for part in pair for sample in part] == whole[8:40]
    unshuffled = [sample for batch in ids(0, 4, mbs=2, shuffle=False) for sample in batch]
    assert unshuffled == [dataset.sample(int(index)).id for index in epoch[:8]]


def test_shuffled_grouped_and_packed_epochs_hold_the_mix(two_sets, tokenizer):
    config = two_sets({"concat": ["a", {"subset": 1, "portion": 0.4, "shuffle": False}, "a"]})
    packing = DataloaderParam(packing=True, packing_window=20)
    dataset = dataset_of(config.model_copy(update={"dataloader_param": packing}), tokenizer, 4, 200)
    expected = sorted([*range(9), 9, 10, *range(9)])
    for options in ({}, {"group_by_modality_length": True}):
        order = build_order(dataset, DataloaderParam(**options), seed=2, epoch=dataset.epoch, global_batch_size=4)
        drawn = [order.at(position) for position in range(40)]
        assert sorted(drawn[:20]) == sorted(drawn[20:]) == expected and drawn[:20] != drawn[20:]
    packed = build_order(dataset, packing, seed=2, epoch=dataset.epoch)
    rows = [packed.at(row) for row in range(20)]
    ends = np.cumsum([len(row) for row in rows]).tolist()
    window = rows[: ends.index(20) + 1]  # a window is an epoch here
    assert sorted(index for row in window for index in row) == expected


@pytest.mark.parametrize(
    ("mixing", "message"),
    [
        ({"concat": [0, 2]}, "mixing names set 2, but basic_parameters has 2; expected 0 to 1"),
        ({"concat": [0, "b"]}, 'mixing names the set "b"; expected a "name" of basic_parameters: "a"'),
        ({"concat": ["a"]}, "set 1 of basic_parameters is nowhere in mixing"),
        ({}, "found none of them; expected exactly one of concat, interleave"),
        ({"concat": [0, 1], "subset": 0}, "found concat and subset; expected exactly one"),
        ({"concat": [0, 1], "seed": 3}, 'found "seed" beside "concat"; it is an option of interleave and subset'),
        ({"concat": [0, {"subset": 1}]}, r"mixing.concat\[1\].mix: found no portion of a subset"),
        ({"concat": [0, {"subset": 1, "portion": 1.5}]}, "found portion 1.5 of a subset, expected one above 0"),
        ({"concat": [0, {"subset": 1, "portion": 0}]}, r"mixing.concat\[1\].mix.portion: found 0"),
        ({"interleave": [0, 1], "probabilities": [1]}, "found 1 probabilities for 2 parts, expected one for each"),
        ({"interleave": [0, 1], "probabilities": [0.5, 0.6]}, "probabilities sum up to 1.1, expected 1"),
        ({"interleave": [0, 1], "stopping_strategy": "never"}, r"mixing.stopping_strategy: found \"never\""),
        (
            {"interleave": [0, 1], "probabilities": [1, 0], "stopping_strategy": "all_exhausted"},
            "part 1 has probability 0 and never comes to its end",
        ),
        ({"concat": [0, 1.5]}, "expected the number of a set, its name, or an object"),
        ({"concat": [0, -1]}, r"mixing.concat\[1\].number: found -1"),
        ({"concat": []}, r"mixing.concat: found \[\]"),
        ({"concatenate": [0, 1]}, 'mixing.concatenate: unknown key; did you mean "concat"?'),
    ],
)
def test_mixes_that_do_not_fit(two_sets, mixing, message):
    with pytest.raises(ConfigError, match=message):
        two_sets(mixing)


def test_names_given_twice_weights_and_empty_portions(two_sets, tokenizer):
    both = {"concat": [0, 1]}
    with pytest.raises(ConfigError, match='two sets of basic_parameters have the name "a"'):
        two_sets(both, second={"name": "a"})
    with pytest.raises(ConfigError, match='found both "mixing" and sets with a "weight"'):
        two_sets(both, {"weight": 1}, {"weight": 1})
    with pytest.raises(ConfigError, match="subset with portion 0.1 of 5 samples leaves none; raise the portion"):
        dataset_of(two_sets({"concat": [0, {"subset": 1, "portion": 0.1}]}), tokenizer, 4, 200)
