"""Shards of every rule, put together again and against megatron-core's own idea of a gated or padded weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_mm.errors import WeightError
from mindspeed_mm.weights.rules import QKV, GateUp, Geometry, Own, Rule, Vocab
from mindspeed_mm.weights.shards import padded_vocab_size, shard, unshard

GEOMETRY = Geometry(1, num_attention_heads=8, num_query_groups=4, kv_channels=2, vocab_size=7)

RULES = {
    "column": (Rule("w", ("w",), axis=0), (8, 3)),
    "row": (Rule("w", ("w",), axis=1), (3, 8)),
    "replicated": (Rule("w", ("w",)), (5,)),
    "qkv": (QKV("w", ("q", "k", "v"), axis=0), (32, 3)),
    "gate_up": (GateUp("w", ("g", "u"), axis=0), (16, 3)),
    "vocab": (Vocab("w", ("w",), axis=0), (7, 3)),
}


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("own", [False, True])
def test_shards_have_equal_shapes_and_make_the_tensor_again(kind, tp_size, own):
    rule, shape = RULES[kind]
    if own:
        rule = Own(rule.target, (rule.target,), rule.axis, like=rule)
    full = torch.randn(shape)
    shards = [shard(full, rule, rank, tp_size, GEOMETRY) for rank in range(tp_size)]
    assert len({tuple(piece.shape) for piece in shards}) == 1
    assert torch.equal(unshard(shards, rule, GEOMETRY), full)


def test_a_rank_holds_its_share_of_gate_and_of_up():
    rule, _ = RULES["gate_up"]
    full = torch.arange(8.0)
    assert shard(full, rule, 0, 2, GEOMETRY).tolist() == [0, 1, 4, 5]
    assert shard(full, rule, 1, 2, GEOMETRY).tolist() == [2, 3, 6, 7]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.sampled_from([1, 2, 3, 4, 8]))
def test_a_vocabulary_of_any_size_is_padded_with_zero_rows(size, tp_size):
    rule = Vocab("w", ("w",), axis=0)
    geometry = Geometry(1, vocab_size=size)
    full = torch.randn(size, 2)
    shards = [shard(full, rule, rank, tp_size, geometry) for rank in range(tp_size)]
    stacked = torch.cat(shards)
    assert stacked.shape[0] == padded_vocab_size(size, tp_size) and stacked.shape[0] % tp_size == 0
    assert not stacked[size:].any()
    assert torch.equal(unshard(shards, rule, geometry), full)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(WeightError, match="4 query groups cannot be split over tensor-parallel size 8"):
        shard(torch.zeros(32, 3), RULES["qkv"][0], 0, 8, GEOMETRY)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(WeightError, match="size 9 cannot be split over tensor-parallel size 2"):
        shard(torch.zeros(9, 3), RULES["column"][0], 0, 2, GEOMETRY)


def test_replicas_that_differ_are_refused():
    with pytest.raises(WeightError, match="hold different copies"):
        unshard([torch.zeros(2), torch.ones(2)], RULES["replicated"][0], GEOMETRY)
