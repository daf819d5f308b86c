"""Rows of several samples: what shares a row, and that sharing changes neither loss nor gradients."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_mm.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from mindspeed_mm.data.collate import Collator
from mindspeed_mm.data.packing import PackedOrder, fill_up, first_fit_decreasing, pack
from mindspeed_mm.data.sample import Encoded
from mindspeed_mm.data.sampler import EpochOrder
from mindspeed_mm.errors import ConfigError
from tests.helpers.media import dataset_of


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60))
def test_first_fit_decreasing(lengths):
    sizes = np.asarray(lengths, dtype=np.int64)
    rows = first_fit_decreasing(sizes, 50)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    fill = [int(sizes[row].sum()) for row in rows]
    assert all(used <= 50 for used in fill)
    assert sum(2 * used <= 50 for used in fill) <= 1  # two rows that are at most half full would have been one


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60))
def test_both_ways_lose_nothing(lengths):
    sizes = np.asarray(lengths, dtype=np.int64)
    for way in (fill_up, pack):
        rows = way(sizes, 50)
        assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
        assert all(sizes[row].sum() <= 50 for row in rows)
    assert len(rows) <= len(first_fit_decreasing(sizes, 50))


def test_filling_up_finds_what_first_fit_misses():
    sizes = np.asarray([5, 4, 4, 3, 2, 2])  # 10 + 10, where first-fit decreasing needs three rows
    assert len(first_fit_decreasing(sizes, 10)) == 3 and len(pack(sizes, 10)) == 2


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(ConfigError, match="a sample of 9 tokens does not fit into a row of 8"):
        first_fit_decreasing(np.asarray([3, 9]), 8)


def llava_like_lengths(count: int) -> np.ndarray:
    """Expanded lengths in the proportions of LLaVA-1.5's 665K mix: 6% text-only (ShareGPT, long), 36% short visual
    questions in several turns, 58% conversations and descriptions behind 576 image tokens. (benchmarks/data.py has the
    same.)"""
    generator = np.random.default_rng(0)
    kind = generator.choice(3, size=count, p=[0.06, 0.36, 0.58])
    text = np.exp(generator.normal([6.9, 5.2, 5.5], [0.6, 0.6, 0.5], size=(count, 3)))[np.arange(count), kind]
    lengths = np.clip(text.astype(np.int64) + 40 + np.where(kind > 0, 576, 0), 60, 2048)
    return np.where(kind > 0, lengths, -lengths)


@pytest.mark.parametrize("capacity", [4096, 8192])
def test_rows_are_nearly_full(capacity):
    lengths = llava_like_lengths(12_000)
    order = PackedOrder(EpochOrder(len(lengths), seed=3), lengths, capacity=capacity, window=2048, seed=3)
    rows = [order.at(position) for position in range(600)]
    used = sum(int(np.abs(lengths[list(row)]).sum()) for row in rows)
    assert used / (capacity * len(rows)) >= 0.97
    again = PackedOrder(EpochOrder(len(lengths), seed=3), lengths, capacity=capacity, window=2048, seed=3)
    assert again.at(577) == rows[577]  # resuming at any row
    assert [order.at(position) for position in (599, 5, 300)] == [rows[599], rows[5], rows[300]]
    assert order.fill() >= 0.97


def test_windows_lose_and_repeat_nothing():
    lengths = llava_like_lengths(1000)
    order = PackedOrder(EpochOrder(1000, seed=1), lengths, capacity=2048, window=250, seed=1)
    seen, position = [], 0
    while len(seen) < 2000:
        seen += order.at(position)
        position += 1
    assert sorted(seen[:1000]) == sorted(seen[1000:2000]) == list(range(1000))


def sample(name, ids, supervised=2, images=()):
    return Encoded(name, ids, [IGNORE_INDEX] * (len(ids) - supervised) + ids[len(ids) - supervised :], images)


def test_collate_a_packed_row():
    rows = [[sample("a", [1, 5, 6]), sample("b", [1, 7], supervised=1)], [sample("c", [1, 8, 9, 9])]]
    batch = Collator(0, row_length=7)(rows)
    none = IGNORE_INDEX
    assert batch.input_ids.tolist() == [[1, 5, 6, 1, 7, 0, 0], [1, 8, 9, 9, 0, 0, 0]]
    assert batch.labels.tolist() == [[5, 6, none, 7, none, none, none], [none, 9, 9, none, none, none, none]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 0, 1, 2]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 0, 0, 0]]
    assert (batch.sample_ids, batch.lengths, batch.tokens, batch.supervised) == (["a", "b", "c"], (3, 2, 4), 9, 5)


def test_a_row_whose_images_are_all_bad_is_empty():
    batch = Collator(0, row_length=4)([[Encoded("(skipped)", [], [], (), ("why",))]])
    assert (batch.sample_ids, batch.tokens, batch.supervised, batch.skipped) == ([], 0, 0, ("why",))


def test_packed_equals_unpacked(golden, single_process):
    """The same samples in shared rows give the loss sum and the gradients of rows of their own."""
    from megatron.driver.initialize import initialize
    from mindspeed_mm.models.build import build_vlm
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.models.spec import load_model_spec
    from mindspeed_mm.objectives.sft import OBJECTIVE
    from mindspeed_mm.platform import get_platform
    from tests.helpers.golden_model import model_json, training_samples
    from tests.helpers.tiny_training import arguments

    initialize(arguments(batch=(1, 1)), get_platform("cpu"))
    trained = ("text_decoder", "vision_encoder", "vision_projector")
    spec = load_model_spec(model_json(golden, trained=trained))
    vlm, _ = build_vlm(spec, Runtime(), torch.device("cpu"))
    samples = [sample for step in training_samples(golden)[:2] for sample in step]
    assert any(IMAGE_TOKEN_INDEX in sample.input_ids for sample in samples)

    def run(batch):
        vlm.zero_grad(set_to_none=True)
        output, loss_function = OBJECTIVE.forward_step(iter([batch]), vlm)
        total, count, _ = loss_function(output)
        total.backward()
        grads = {name: p.grad.clone() for name, p in vlm.named_parameters() if p.grad is not None}
        return total.item(), int(count), grads

    alone = run(Collator(0)(samples))
    lengths = np.asarray([len(sample.input_ids) for sample in samples])
    rows = first_fit_decreasing(lengths, int(lengths.max()) + 60)
    assert len(rows) < len(samples)
    packed = Collator(0, row_length=int(lengths.max()) + 60)([[samples[i] for i in row] for row in rows])
    together = run(packed)
    assert together[0] == pytest.approx(alone[0], rel=1e-6) and together[1] == alone[1]
    assert together[2].keys() == alone[2].keys()
    for name, gradient in alone[2].items():
        scale = gradient.abs().max().clamp(min=1e-3)
        assert (together[2][name] - gradient).abs().max() / scale < 1e-5, name
    norm = torch.sqrt(sum(g.square().sum() for g in alone[2].values()))
    difference = torch.sqrt(sum((together[2][n] - g).square().sum() for n, g in alone[2].items()))
    assert difference / norm < 1e-6


def test_the_loader_packs(make_config, tokenizer):
    from data_helpers import make_record

    from mindspeed_mm.data.build import build_loader
    from mindspeed_mm.data.config import DataloaderParam

    names = [None, "red.png", "none.png"]
    config = make_config([make_record(i, names[i % 3]) for i in range(12)], image_error="skip")
    config = config.model_copy(update={"dataloader_param": DataloaderParam(packing=True, packing_window=6)})
    dataset = dataset_of(config, tokenizer, 4, 260)

    def batches(consumed, count, workers=0):
        options = config.dataloader_param
        order = {"consumed_samples": consumed, "micro_batch_size": 1, "dp_rank": 0, "dp_size": 1, "seed": 1}
        return list(islice(build_loader(dataset, **order, num_workers=workers, pad_token_id=0, options=options), count))

    whole = batches(0, 8)
    assert all(batch.input_ids.shape == (1, 260) for batch in whole)
    assert max(len(batch.sample_ids) for batch in whole) > 1
    assert sum(len(batch.skipped) for batch in whole) > 0
    resumed = batches(5, 3, workers=1)
    assert [batch.sample_ids for batch in resumed] == [batch.sample_ids for batch in whole[5:]]
    assert torch.equal(resumed[0].segment_ids, whole[5].segment_ids)
