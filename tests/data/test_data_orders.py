"""Weighted and grouped orders, and what is done with samples that are too long or whose image is bad."""

import json
from itertools import islice

import numpy as np
import pytest
from data_helpers import make_record
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_mm.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from mindspeed_mm.data import build as build_module
from mindspeed_mm.data.build import DataCounts, build_loader, build_order
from mindspeed_mm.data.config import DataConfig, DataloaderParam
from mindspeed_mm.data.sampler import GroupedOrder, WeightedOrder
from mindspeed_mm.errors import ConfigError, DataError
from tests.helpers.media import dataset_of


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.floats(0.05, 5), min_size=1, max_size=4), seed=st.integers(0, 5), count=st.integers(1, 4000))
def test_weights_are_kept_at_any_length(weights, seed, count):
    sizes = [7 + 3 * number for number in range(len(weights))]
    order = WeightedOrder(sizes, weights, seed=seed)
    ends = np.cumsum(sizes)
    sets = np.searchsorted(ends, [order.at(position) for position in range(count)], side="right")
    shares = np.bincount(sets, minlength=len(sizes)) / count
    expected = np.asarray(weights) / sum(weights)
    assert np.abs(shares - expected).max() * count <= WeightedOrder.BLOCK / 2 + 2
    again = WeightedOrder(sizes, weights, seed=seed)
    assert again.at(count - 1) == order.at(count - 1)


def test_each_weighted_set_is_gone_through_evenly():
    order = WeightedOrder([10, 4], [1, 1], seed=0)
    drawn = [order.at(position) for position in range(4 * WeightedOrder.BLOCK)]
    times = np.bincount(drawn, minlength=14)
    assert times[:10].max() - times[:10].min() <= 1 and times[10:].max() - times[10:].min() <= 1


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100).map(lambda n: n if n % 3 else -n), min_size=1, max_size=60),
    batch=st.integers(1, 9),
)
def test_grouping_loses_nothing(lengths, batch):
    order = GroupedOrder(np.asarray(lengths), batch=batch, seed=1)
    for epoch in range(3):
        drawn = [order.at(epoch * len(lengths) + position) for position in range(len(lengths))]
        assert sorted(drawn) == list(range(len(lengths)))


def test_batches_are_of_one_kind_and_sorted():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 500, 1003) * np.where(generator.random(1003) < 0.7, 1, -1)
    order = GroupedOrder(lengths, batch=8, seed=4)
    batches = [[lengths[order.at(8 * number + i)] for i in range(8)] for number in range(3 * 1003 // 8)]
    pure = [batch for batch in batches if len({value > 0 for value in batch}) == 1]
    assert len(pure) / len(batches) > 0.97
    assert all(np.all(np.diff(np.abs(batch)) <= 0) for batch in pure)


def options(**fields):
    return DataloaderParam(**fields)


def test_orders_that_do_not_fit(make_config, tokenizer):
    dataset = dataset_of(make_config([make_record(0)]), tokenizer, 4, 200)
    weighted = make_config([], basic_parameters=[{"data_path": "a", "weight": 2}]).dataset_param
    with pytest.raises(ValueError, match='"weight" and group_by_modality_length do not go together; use repeat_time'):
        DataConfig(dataset_param=weighted, dataloader_param=options(group_by_modality_length=True))
    with pytest.raises(ValueError, match="order of its own"):
        options(group_by_modality_length=True, packing=True)
    with pytest.raises(ConfigError, match="packing_length is 20, less than"):
        build_order(dataset, options(packing=True, packing_length=20), seed=1)


@pytest.mark.parametrize(
    ("second", "message"),
    [({}, 'set 1 has no "weight" but others have one'), ({"weight": 1, "repeat_time": 2}, 'both "weight" and')],
)
def test_weights_that_do_not_fit(make_config, second, message):
    with pytest.raises(ConfigError, match=message):
        make_config([], basic_parameters=[{"data_path": "a", "weight": 2}, {"data_path": "b"} | second])


@pytest.fixture
def long_records():
    """Short, long, image with a long text, image behind a long text."""
    late = {"from": "human", "value": "<image>\nAnd this?"}
    turns = make_record(3, text="word " * 100)["conversations"] + [late, {"from": "gpt", "value": "x"}]
    return [
        make_record(0),
        make_record(1, text="word " * 300),
        make_record(2, "red.png", text="word " * 300),
        {"id": "r3", "image": "red.png", "conversations": turns},
    ]


def test_what_is_too_long(make_config, tokenizer, long_records, caplog):
    def build(policy):
        return dataset_of(make_config(long_records, overlong=policy), tokenizer, 4, 180)

    with pytest.raises(DataError, match=r"record 1 \(id r1\): has \d+ tokens .* \"truncate\" or \"drop\""):
        build("error")
    kept = build("drop")
    assert [kept[i].sample_id for i in range(len(kept))] == ["r0"] and kept.sets[0].dropped == 3
    assert "of 4 records, 3 are over 180 tokens and left out, 0 are cut to that length (overlong: drop)" in caplog.text
    cut = build("truncate")
    assert cut.sets[0].truncated == 2 and "1 are over 180 tokens and left out, 2 are cut" in caplog.text
    samples = [cut[i] for i in range(len(cut))]
    assert [sample.sample_id for sample in samples] == ["r0", "r1", "r2"]  # r3 would lose its image
    assert [len(sample.input_ids) for sample in samples[1:]] == [180, 180]
    assert samples[2].input_ids.count(IMAGE_TOKEN_INDEX) == 4
    assert np.abs(cut.lengths).tolist() == [len(sample.input_ids) for sample in samples]


def test_an_answer_of_200_000_characters(make_config, tokenizer):
    records = [make_record(0), make_record(1, text="word " * 40_000)]
    with pytest.raises(
        DataError, match=r"record 1 \(id r1\): has \d{5,} tokens.*longest text is that of turn 1, 200000 "
    ):
        dataset_of(make_config(records), tokenizer, 4, 2048)


@pytest.mark.parametrize("no_answer", ["empty", "blank", "none"])
def test_empty_answers(make_config, tokenizer, caplog, no_answer):
    bad = make_record(1)
    bad["conversations"] = bad["conversations"][: 1 if no_answer == "none" else 2]
    if no_answer != "none":
        bad["conversations"][1]["value"] = "" if no_answer == "empty" else " \n"

    def build(policy, records=None):
        records = records or [make_record(0), bad, make_record(2)]
        return dataset_of(make_config(records, **policy), tokenizer, 4, 180)

    what = "there is no answer" if no_answer == "none" else "the answer in turn 1 is empty"
    kept = build({})
    assert [any(label != IGNORE_INDEX for label in kept[i].labels) for i in range(3)] == [True, False, True]
    assert "1 records with an empty answer are kept" in caplog.text and what in caplog.text
    dropped = build({"empty_answer": "drop"})
    assert [dropped[i].sample_id for i in range(2)] == ["r0", "r2"] and len(dropped) == 2
    assert len(build({"empty_answer": "drop", "overlong": "drop"})) == 2
    with pytest.raises(DataError, match=rf'record 1 \(id r1\): {what}; expected .* "value": "A cat.".*"mask"'):
        build({"empty_answer": "error"})
    caplog.clear()
    build({"empty_answer": "error"}, [make_record(0)])
    assert not caplog.text


def test_an_empty_caption_teaches_nothing(make_config, tokenizer):
    dataset = dataset_of(make_config([make_record(0, "red.png", text="\n")], template_name="plain"), tokenizer, 4, 9)
    assert set(dataset[0].labels) == {IGNORE_INDEX}


def test_nothing_is_left(make_config, tokenizer, long_records):
    with pytest.raises(DataError, match="all of its 3 records are left out"):
        dataset_of(make_config(long_records[1:], overlong="drop"), tokenizer, 4, 180)


def test_too_many_bad_images_stop_the_run(make_config, tokenizer, monkeypatch):
    monkeypatch.setattr(build_module, "LEAST_JUDGED", 10)
    names = [None, None, None, "none.png"]
    config = make_config([make_record(i, names[i % 4]) for i in range(40)], image_error="skip", max_skip_percent=10)
    dataset = dataset_of(config, tokenizer, 4, 200)
    counts = DataCounts()
    order = {"consumed_samples": 0, "micro_batch_size": 2, "dp_rank": 0, "dp_size": 1, "seed": 1}
    with pytest.raises(DataError, match="more than max_skip_percent 10 allows; the last one: .*none.png is missing"):
        list(islice(build_loader(dataset, **order, num_workers=0, pad_token_id=0, counts=counts), 40))
    assert counts.skipped > 1 and counts.samples > counts.skipped


def test_weights_and_resume_at_another_size(make_config, tokenizer, tmp_path):
    for name, start in (("a", 0), ("b", 50)):
        (tmp_path / f"{name}.json").write_text(json.dumps([make_record(start + i) for i in range(9)]))
    sets = [{"data_path": str(tmp_path / f"{name}.json"), "weight": weight} for name, weight in (("a", 1), ("b", 3))]
    config = make_config([], basic_parameters=sets)
    dataset = dataset_of(config, tokenizer, 4, 200)

    def ids(consumed, count, rank=0, ranks=1, mbs=4):
        order = {"consumed_samples": consumed, "micro_batch_size": mbs, "dp_rank": rank, "dp_size": ranks, "seed": 1}
        loader = build_loader(dataset, **order, num_workers=0, pad_token_id=0, weights=config.dataset_param.weights)
        return [batch.sample_ids for batch in islice(loader, count)]

    whole = [sample for batch in ids(0, 10) for sample in batch]
    first, second = ids(8, 8, 0, 2, 2), ids(8, 8, 1, 2, 2)
    assert [sample for pair in zip(first, second, strict=True) for part in pair for sample in part] == whole[8:40]


def test_wrong_suffixes_16_bits_and_memory(tmp_path):
    from PIL import Image

    from mindspeed_mm.data.image import ImageError, load_image
    from mindspeed_mm.data.sample import ImageBytes

    deep = np.full((4, 4), 40_000, dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert load_image(tmp_path / "deep.png").getpixel((0, 0)) == (156, 156, 156)
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ImageError, match="32-bit pixels, whose range no file tells"):
        load_image(tmp_path / "float.tiff")
    Image.new("RGB", (3, 3), "blue").save(tmp_path / "really.gif", "PNG")
    assert load_image(tmp_path / "really.gif").getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(ImageError, match=r"really.jpg is missing.*; really.gif is there: `check-data --fix-suffix`"):
        load_image(tmp_path / "really.jpg")
    data = ImageBytes("shard.tar: x.png", (tmp_path / "really.gif").read_bytes())
    assert load_image(data).size == (3, 3)
    with pytest.raises(ImageError, match="image shard.tar: y.png cannot be decoded"):
        load_image(ImageBytes("shard.tar: y.png", b"nothing"))
