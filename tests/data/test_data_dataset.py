"""From records to batches: images, lengths, policies, collation, the loader."""

import logging
import multiprocessing
import os
import signal
from itertools import islice

import pytest
import torch
from data_helpers import make_record

from mindspeed_mm.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from mindspeed_mm.data.build import build_loader
from mindspeed_mm.data.collate import Collator
from mindspeed_mm.data.encode import encode
from mindspeed_mm.data.expand import expand_images, fit_length
from mindspeed_mm.data.sample import Encoded
from mindspeed_mm.errors import DataError, TemplateError
from tests.helpers.media import dataset_of, fixed_plan, items

TOKENS_PER_IMAGE = 4


@pytest.fixture
def make_dataset(make_config, tokenizer):
    def make(records, max_length=512, **dataset_param):
        return dataset_of(make_config(records, **dataset_param), tokenizer, TOKENS_PER_IMAGE, max_length)

    return make


def loader(dataset, consumed=0, mbs=2, rank=0, dp=1, seed=7, workers=0, multiple=1):
    return build_loader(
        dataset,
        consumed_samples=consumed,
        micro_batch_size=mbs,
        dp_rank=rank,
        dp_size=dp,
        seed=seed,
        num_workers=workers,
        pad_token_id=0,
        pad_multiple=multiple,
    )


def test_one_sample(make_dataset, tokenizer):
    record = make_record(3, "red.png")
    dataset = make_dataset([record])
    sample = dataset[0]
    ids, labels = encode(record, tokenizer, "v1")
    place = ids.index(IMAGE_TOKEN_INDEX)
    assert sample.input_ids == ids[:place] + [IMAGE_TOKEN_INDEX] * 4 + ids[place + 1 :]
    assert sample.labels == labels[:place] + [IGNORE_INDEX] * 4 + labels[place + 1 :]
    assert sample.sample_id == "r3"
    ((image,),) = (media.pixels for media in sample.media)
    assert image.shape == (3, 28, 28) and image.dtype == torch.float32
    red, border = image[:, 14, 14], image[:, 0, 0]
    assert red[0] > red[1] and border.abs().max() < 0.02  # the mean colour is about zero after normalisation


def test_text_only_and_several_images(make_dataset):
    dataset = make_dataset([make_record(0), make_record(1, ["red.png", "blue.png"])])
    assert dataset[0].media == () and IMAGE_TOKEN_INDEX not in dataset[0].input_ids
    assert dataset[1].input_ids.count(IMAGE_TOKEN_INDEX) == 2 * TOKENS_PER_IMAGE
    assert len(dataset[1].media) == 2


def test_several_files_and_repeats(make_dataset, tmp_path):
    import json

    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(make_record(number)) for number in range(4)))
    (tmp_path / "b.json").write_text(json.dumps([make_record(number) for number in (10, 11)]))
    sets = [
        {"data_path": str(tmp_path / "a.jsonl"), "repeat_time": 0.5},
        {"data_path": str(tmp_path / "b.json"), "repeat_time": 2},
    ]
    dataset = make_dataset([], basic_parameters=sets)
    assert [dataset[i].sample_id for i in range(len(dataset))] == ["r0", "r1", "r10", "r11", "r10", "r11"]
    sets[0]["repeat_time"] = 0.1
    with pytest.raises(DataError, match="a share of 0.1 of 4 records is none"):
        make_dataset([], basic_parameters=sets)
    with pytest.raises(IndexError):
        dataset[6]


ASK, ANSWER = {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}
TWO_TURNS = [ASK, ANSWER, ASK, ANSWER]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": "x"}, '"conversations" is missing .the record has .id.'),
        ({"id": "x", "messages": []}, 'the dataset_type "messages" reads records with "messages"'),
        ({"id": "x", "conversations": "Hi"}, "\"conversations\" is 'Hi'; expected a list of turns"),
        ({"id": "\ud800", "conversations": TWO_TURNS}, "id holds half of a surrogate pair"),
        (make_record(1, "a\0b.jpg"), "with a NUL character"),
        (make_record(1, "\ud800.jpg"), "image holds half of a surrogate pair"),
        (make_record(1, "red.png") | {"image": ["red.png", "red.png"]}, "1 <image> placeholders .* names 2; expected"),
        ({**make_record(1, "red.png"), "image": None}, "1 <image> placeholders .* names 0"),
        ({"id": "y", "image": "red.png", "conversations": TWO_TURNS}, "2 <image> placeholders .* names 1"),
        (make_record(1, "../outside.png"), "lies outside data_folder"),
        (make_record(1, "/etc/hostname"), "lies outside data_folder"),
        (make_record(1) | {"image": 3}, "expected the name of an image"),
    ],
)
def test_broken_records_are_found_at_the_start(make_dataset, record, message):
    with pytest.raises(DataError, match=rf"records.json: record 1( \(id \w+\))?: .*{message}"):
        make_dataset([make_record(0), record])


def test_text_only_records_do_not_fit_plain(make_dataset):
    with pytest.raises(TemplateError, match=r"record 0 \(id r0\): a caption template takes"):
        make_dataset([make_record(0)], template_name="plain")


def test_settings_that_do_not_fit(make_dataset, make_config, tokenizer):
    with pytest.raises(TemplateError, match="the tokenizer has no token"):
        make_dataset([make_record(0)], template_name="mpt")


def test_image_errors_stop_by_default(make_dataset, image_folder):
    (image_folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    dataset = make_dataset([make_record(0, "none.png"), make_record(1, "broken.png")])
    with pytest.raises(DataError, match=r"record 0 \(id r0\): image .*none.png is missing"):
        dataset[0]
    with pytest.raises(DataError, match=r"record 1 \(id r1\): image .*broken.png cannot be decoded"):
        dataset[1]
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"^[^\n]*record [01] .*image .*png [^\n]*$"):
            next(loader(dataset, workers=workers))


def test_image_errors_can_be_skipped(make_dataset, caplog):
    names = [None, "none.png", "gone.png", "red.png"]
    dataset = make_dataset([make_record(i, name) for i, name in enumerate(names)], image_error="skip")
    assert [dataset[i].sample_id for i in range(4)] == ["r0", "r3", "r3", "r3"]
    with caplog.at_level(logging.WARNING):
        batches = list(islice(loader(dataset, mbs=4), 3))
    assert [len(batch.skipped) for batch in batches] == [3, 3, 3]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and all(message.startswith("record left out: ") for message in messages)
    bad = make_dataset([make_record(0, "none.png"), make_record(1, "gone.png")], image_error="skip")
    with pytest.raises(DataError, match="2 records in a row have no usable image"):
        bad[0]


def test_samples_that_are_too_long(make_dataset):
    record = make_record(0, "red.png")
    length = len(make_dataset([record])[0].input_ids)
    assert len(make_dataset([record], max_length=length)[0].input_ids) == length
    with pytest.raises(DataError, match=rf"record 0 \(id r0\): has {length} tokens .* more than the maximum of"):
        make_dataset([record], max_length=length - 1)[0]
    cut = make_dataset([record], max_length=length - 1, overlong="truncate")[0]
    assert len(cut.input_ids) == len(cut.labels) == length - 1


def test_truncation_never_cuts_an_image_nor_all_supervision():
    image = [IMAGE_TOKEN_INDEX] * 3
    ids, labels = [1, *image, 5, 6], [IGNORE_INDEX] * 4 + [5, 6]
    assert fit_length(ids, labels, 5, "truncate") == (ids[:5], labels[:5])
    with pytest.raises(DataError, match="cutting it to 3 would cut an image"):
        fit_length(ids, labels, 3, "truncate")
    with pytest.raises(DataError, match="cutting it to 4 would leave none that is supervised"):
        fit_length(ids, labels, 4, "truncate")
    masked = [IGNORE_INDEX] * 6
    assert fit_length(ids, masked, 4, "truncate") == (ids[:4], masked[:4])


def test_expand_images():
    ids, labels = expand_images([1, IMAGE_TOKEN_INDEX, 7], [IGNORE_INDEX, IGNORE_INDEX, 7], [fixed_plan(2)])
    assert ids == [1, IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX, 7]
    assert labels == [IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 7]


def test_collate():
    image = torch.ones(3, 2, 2)
    samples = [
        Encoded("a", [1, 5, 6, 2], [IGNORE_INDEX, IGNORE_INDEX, 6, 2]),
        Encoded("b", [1, IMAGE_TOKEN_INDEX], [IGNORE_INDEX, IGNORE_INDEX], items([image]), ("why",)),
    ]
    batch = Collator(pad_token_id=9, pad_multiple=3)(samples)
    assert batch.input_ids.tolist() == [[1, 5, 6, 2, 9, 9], [1, IMAGE_TOKEN_INDEX, 9, 9, 9, 9]]
    none = IGNORE_INDEX
    assert batch.labels.tolist() == [[none, 6, 2, none, none, none], [none] * 6]
    assert batch.position_ids.tolist() == [list(range(6))] * 2
    assert torch.equal(batch.media.pixels, image[None]) and batch.media.rows == (1,)
    assert (batch.sample_ids, batch.tokens, batch.supervised, batch.skipped) == (["a", "b"], 6, 2, ("why",))
    assert all(tensor.dtype == torch.int64 for tensor in (batch.input_ids, batch.labels, batch.position_ids))
    text_only = Collator(0)(samples[:1])
    assert text_only.media is None and text_only.input_ids.shape == (1, 4)


def test_masked_samples_train(make_dataset):
    record = make_record(0)
    record["conversations"][1]["value"] = ""
    batch = next(loader(make_dataset([record]), mbs=1))
    assert batch.supervised == 0 and batch.tokens > 0


@pytest.fixture
def mixed(make_dataset):
    names = [None, "red.png", ["red.png", "blue.png"], "green.png", None]
    return make_dataset([make_record(i, names[i % 5]) for i in range(11)])


def same_media(left, right):
    if left.media is None or right.media is None:
        return left.media is right.media
    return left.media.rows == right.media.rows and torch.equal(left.media.pixels, right.media.pixels)


def ids_of(batches):
    return [sample_id for batch in batches for sample_id in batch.sample_ids]


def test_loader_order(mixed):
    whole = list(islice(loader(mixed, mbs=2), 12))
    assert sorted(ids_of(whole)[:11]) == sorted(f"r{i}" for i in range(11))
    resumed = list(islice(loader(mixed, consumed=6, mbs=2), 9))
    assert ids_of(resumed) == ids_of(whole)[6:]
    for ours, theirs in zip(resumed, whole[3:], strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids) and same_media(ours, theirs)
    ranks = [ids_of(islice(loader(mixed, mbs=1, rank=rank, dp=2), 6)) for rank in range(2)]
    assert [sample for pair in zip(*ranks, strict=True) for sample in pair] == ids_of(whole)[:12]


def test_workers_give_the_same_and_leave_the_global_generator_alone(mixed):
    expected = list(islice(loader(mixed, mbs=3, multiple=8), 6))
    state = torch.random.get_rng_state()
    found = list(islice(loader(mixed, mbs=3, multiple=8, workers=2), 6))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert ids_of(found) == ids_of(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.labels, theirs.labels) and same_media(ours, theirs)
        assert ours.input_ids.shape[1] % 8 == 0


def test_signals_that_stop_a_run_do_not_stop_its_workers(mixed):
    """torchrun and Slurm send them to every process; the training process decides, and still reads its last step."""
    before = set(multiprocessing.active_children())
    batches = loader(mixed, mbs=3, multiple=8, workers=2)
    first = list(islice(batches, 2))  # one of each worker, so that both have left the group by now
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        assert os.getpgid(worker.pid) == worker.pid  # out of reach of what is sent to the training process's group
        os.kill(worker.pid, signal.SIGUSR1)
        os.kill(worker.pid, signal.SIGTERM)
    found = [*first, *islice(batches, 6)]
    wanted = list(islice(loader(mixed, mbs=3, multiple=8), 8))
    assert all(torch.equal(one.input_ids, other.input_ids) for one, other in zip(found, wanted, strict=True))
    assert all(worker.is_alive() for worker in workers)


def test_the_dataset_can_be_sent_to_spawned_workers(mixed):
    import pickle

    copy = pickle.loads(pickle.dumps(mixed))
    assert copy[3].input_ids == mixed[3].input_ids
