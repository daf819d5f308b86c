"""Rules against independent loops, both ways, over random geometries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.part import find_part
from mindspeed_mm.weights.rules import QKV, Drop, GateUp, Geometry, PackedQKV, Reshape, Rule, RuleSet, Vocab
from tests.weights.weight_helpers import random_hf_state

GEOMETRY = Geometry(num_layers=2, num_attention_heads=4, num_query_groups=2, kv_channels=3, vocab_size=7)


def grouped_by_hand(query, key, value, geometry):
    """Rows in megatron-core's order, one row at a time."""
    rows = []
    channels, per_group = geometry.kv_channels, geometry.heads_per_group
    for group in range(geometry.num_query_groups):
        for head in range(group * per_group, (group + 1) * per_group):
            rows += [query[head * channels + channel] for channel in range(channels)]
        for tensor in (key, value):
            rows += [tensor[group * channels + channel] for channel in range(channels)]
    return torch.stack(rows)


geometries = st.builds(
    lambda layers, groups, per_group, channels: Geometry(layers, groups * per_group, groups, channels),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([2, 4]),
)


@settings(max_examples=25, deadline=None)
@given(geometries, st.booleans())
def test_qkv_groups_rows_as_megatron_core_does_and_back(geometry, bias):
    width = () if bias else (5,)
    query = torch.randn(geometry.num_attention_heads * geometry.kv_channels, *width)
    key, value = (torch.randn(geometry.num_query_groups * geometry.kv_channels, *width) for _ in range(2))
    rule = QKV("qkv", ("q", "k", "v"), axis=0)
    ours = rule.to_ours([query, key, value], geometry)
    assert torch.equal(ours, grouped_by_hand(query, key, value, geometry))
    for back, source in zip(rule.to_theirs(ours, geometry), (query, key, value), strict=True):
        assert torch.equal(back, source)


def test_packed_qkv_is_qkv_of_its_thirds():
    geometry = Geometry(1, 4, 4, 2)
    packed = torch.randn(24, 8)
    rule = PackedQKV("qkv", ("in_proj",), axis=0)
    ours = rule.to_ours([packed], geometry)
    assert torch.equal(ours, grouped_by_hand(*packed.chunk(3), geometry))
    assert torch.equal(rule.to_theirs(ours, geometry)[0], packed)


def test_gate_comes_first():
    gate, up = torch.randn(3, 2), torch.randn(3, 2)
    rule = GateUp("fc1", ("gate", "up"), axis=0)
    ours = rule.to_ours([gate, up], GEOMETRY)
    assert torch.equal(ours[:3], gate) and torch.equal(ours[3:], up)
    assert all(torch.equal(a, b) for a, b in zip(rule.to_theirs(ours, GEOMETRY), (gate, up), strict=True))


def test_reshape_keeps_values():
    rule = Reshape("class_token", ("class_embedding",), ours=(1, 1, -1), theirs=(-1,))
    source = torch.arange(5.0)
    assert rule.to_ours([source], GEOMETRY).shape == (1, 1, 5)
    assert torch.equal(rule.to_theirs(rule.to_ours([source], GEOMETRY), GEOMETRY)[0], source)


def test_gate_and_up_of_other_shapes_are_refused():
    with pytest.raises(WeightError, match=r"gate has shape \[3, 2\] and the up projection \[4, 2\]"):
        GateUp("fc1", ("gate", "up")).to_ours([torch.zeros(3, 2), torch.zeros(4, 2)], GEOMETRY)


@pytest.mark.parametrize("rule", [QKV("qkv", ("q", "k", "v")), PackedQKV("qkv", ("in",))])
def test_qkv_with_wrong_head_count_is_refused(rule):
    with pytest.raises(WeightError, match="4 heads in 2 query groups of 3 channels"):
        rule.to_ours([torch.zeros(5, 2)] * len(rule.sources), GEOMETRY)
    with pytest.raises(WeightError, match="expected 24 rows"):
        rule.to_theirs(torch.zeros(5, 2), GEOMETRY)


RULES = RuleSet(
    (
        Vocab("embedding", ("embed.weight",), axis=0),
        Rule("layers.{}.proj", ("blocks.{}.out.weight",), axis=1),
        Rule("layers.{}.bias", ("blocks.{}.out.bias",), needs="qkv_bias"),
        Rule("post", ("post.weight",), unused=True),
        Vocab("output", ("head.weight",), axis=0),
        Drop("blocks.{}.inv_freq"),
        Drop("text.*"),
    ),
    tied=("output", "embedding"),
)
NAMES = ["embed.weight", "blocks.0.out.weight", "blocks.1.out.weight", "head.weight"]


def test_expected_names_follow_the_geometry():
    assert RULES.expected(GEOMETRY) == ["embedding", "layers.0.proj", "layers.1.proj", "output"]
    assert "layers.1.bias" in RULES.expected(Geometry(2, qkv_bias=True))
    assert "output" not in RULES.expected(Geometry(2, tied=True))


def test_every_name_is_used_or_dropped_once():
    names = [*NAMES, "post.weight", "blocks.1.inv_freq", "text.anything.at.all"]
    match = RULES.match(names, GEOMETRY)
    assert sorted(match.dropped) == ["blocks.1.inv_freq", "text.anything.at.all"]
    used = [name for step in match.steps for name in step.sources]
    assert sorted(used + list(match.dropped)) == sorted(names)


def test_unused_layers_may_be_there_or_not():
    geometry = Geometry(num_layers=1, source_layers=2)
    for names in (NAMES, [name for name in NAMES if ".1." not in name]):
        match = RULES.match(names, geometry)
        assert [step.target for step in match.steps if not step.unused] == ["embedding", "layers.0.proj", "output"]


def test_missing_and_unknown_names_are_listed_with_the_nearest():
    names = [name.replace("blocks.1.out", "blocks.1.oot") for name in NAMES]
    with pytest.raises(WeightError, match=r"missing \(1\): blocks.1.out.weight") as error:
        RULES.match(names, GEOMETRY, where="file")
    assert "blocks.1.oot.weight (nearest missing: blocks.1.out.weight)" in str(error.value)
    with pytest.raises(WeightError, match=r"unknown \(1\): blocks.2.out.weight"):
        RULES.match([*NAMES, "blocks.2.out.weight"], GEOMETRY)


def test_a_long_list_is_shortened():
    with pytest.raises(WeightError, match=r"missing \(22\): .* and 14 more"):
        RULES.match(["head.weight"], Geometry(num_layers=21))


def test_hints_name_the_tied_head_and_lora():
    with pytest.raises(WeightError, match='"tie_word_embeddings": true in its config.json, or, where a model.json'):
        RULES.match(NAMES[:-1], GEOMETRY)
    with pytest.raises(WeightError, match="merge them into the full weights"):
        RULES.match([*NAMES, "blocks.0.out.lora_A.weight"], GEOMETRY)


def test_a_tied_source_may_store_its_head():
    assert RULES.match(NAMES, Geometry(2, tied=True)).dropped == ("head.weight",)


def test_export_refuses_a_state_that_does_not_fit():
    state = {name: torch.zeros(2, 2) for name in RULES.expected(GEOMETRY)}
    state.pop("output")
    with pytest.raises(WeightError, match=r"missing \(1\): output"):
        RULES.export(state, GEOMETRY)
    with pytest.raises(WeightError, match=r"unknown \(1\): more"):
        RULES.export({**state, "output": torch.zeros(2), "more": torch.zeros(2)}, GEOMETRY)


@settings(max_examples=20, deadline=None)
@given(geometries, st.booleans(), st.integers(3, 9))
def test_llama_round_trip_is_bit_equal(geometry, tied, vocab):
    part = find_part("text_decoder", "llama")
    spec = part.Spec(
        num_layers=geometry.num_layers,
        hidden_size=6,
        num_attention_heads=geometry.num_attention_heads,
        num_query_groups=geometry.num_query_groups,
        kv_channels=geometry.kv_channels,
        ffn_hidden_size=5,
        language_vocab_size=vocab,
        share_embeddings_and_output_weights=tied,
    )
    state = random_hf_state(spec, torch.bfloat16)
    ours = part.rules["hf"].import_(state, state.__getitem__, spec.geometry)
    assert sorted(ours) == sorted(part.rules["hf"].expected(spec.geometry))
    assert sorted(ours) == sorted(part.rules["ours"].expected(spec.geometry))
    back = part.rules["hf"].export(ours, spec.geometry)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_sources_of_other_widths_are_not_joined():
    rule = QKV("w", ("q", "k", "v"), axis=0)
    geometry = Geometry(1, num_attention_heads=2, num_query_groups=2, kv_channels=2)
    shapes = [(4, 3), (4, 3), (4, 5)]
    for device in ("cpu", "meta"):
        tensors = [torch.empty(shape, device=device) for shape in shapes]
        with pytest.raises(WeightError, match="w: its sources have shapes .* expected equal ones"):
            rule.to_ours(tensors, geometry)
