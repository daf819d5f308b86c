"""Preference records as tokens: what both sides share once, positions, lengths, policies."""

import dataclasses

import numpy as np
import pytest
import torch

from mindspeed_mm.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from mindspeed_mm.data.build import build_loader
from mindspeed_mm.data.collate import Collator
from mindspeed_mm.data.config import DataloaderParam
from mindspeed_mm.data.pairs import longer_side, pair_positions
from mindspeed_mm.errors import ConfigError, DataError
from tests.helpers.media import dataset_of

RECORD = {"prompt": "<image>\nWhat is it?", "chosen": "A cat.", "rejected": "A small dog.", "images": ["red.png"]}
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}


def answer(text):
    return {"role": "assistant", "content": text}


def parts(message):
    """A message of text alone, in parts."""
    return message | {"content": [{"type": "text", "text": message["content"]}]}


@pytest.fixture
def pairs(make_config, tokenizer):
    """pairs(*records, max_length=.., **dataset_param) -> MultimodalDataset"""

    def make(*records, max_length=200, measured=False, **parameters):
        config = make_config(list(records), dataset_type="preference", **parameters)
        if measured:
            config = config.model_copy(update={"dataloader_param": DataloaderParam(packing=True)})
        return dataset_of(config, tokenizer, 4, max_length, preferences=True)

    return make


def conversation(sample, side):
    shared, first, _ = sample.branches
    end = slice(shared, shared + first) if side == 0 else slice(shared + first, None)
    return sample.input_ids[:shared] + sample.input_ids[end], sample.labels[:shared] + sample.labels[end]


def test_both_sides_are_whole_conversations(pairs, tokenizer):
    dataset = pairs(RECORD)
    sample, source = dataset[0], dataset.sample(0)
    for side, turns in enumerate((source.turns, source.rejected)):
        whole = dataset.encoding.of(dataclasses.replace(source, turns=turns, rejected=None))
        assert conversation(sample, side) == whole
        ids, labels = conversation(sample, side)
        text = RECORD[("chosen", "rejected")[side]]
        assert text in tokenizer.decode([token for token in labels if token != IGNORE_INDEX])
    shared, first, second = sample.branches
    assert sample.input_ids[shared] == sample.input_ids[shared + first]  # the prompt's last token opens both
    assert sample.input_ids.count(IMAGE_TOKEN_INDEX) == 4 and len(sample.media) == 1
    assert all(label == IGNORE_INDEX for label in sample.labels[: shared + 1])
    assert longer_side(sample.input_ids, sample.branches) == conversation(sample, 1)[0]


def test_every_form_gives_the_same_tokens(pairs):
    turns = [{"from": "human", "value": RECORD["prompt"]}]
    samples = [
        pairs(record)[0]
        for record in (
            RECORD,
            {
                "prompt": [QUESTION],
                "chosen": [answer("A cat.")],
                "rejected": [answer("A small dog.")],
                "image": "red.png",
            },
            {
                "chosen": [QUESTION, answer("A cat.")],
                "rejected": [QUESTION, answer("A small dog.")],
                "images": ["red.png"],
            },
            {
                "prompt": [{"role": "user", "content": "What is it?"}],
                "chosen": [parts(answer("A cat."))],
                "rejected": [parts(answer("A small dog."))],
                "images": ["red.png"],
            },
            {
                "chosen": [{"role": "user", "content": "What is it?"}, answer("A cat.")],
                "rejected": [{"role": "user", "content": "What is it?"}, answer("A small dog.")],
                "images": ["red.png"],
            },
            {
                "conversations": turns,
                "chosen": {"from": "gpt", "value": "A cat."},
                "rejected": {"from": "gpt", "value": "A small dog."},
                "images": ["red.png"],
            },
        )
    ]
    for sample in samples[1:]:
        assert (sample.input_ids, sample.labels, sample.branches) == dataclasses.astuple(samples[0])[1:3] + (
            samples[0].branches,
        )


def test_images_without_a_place_stand_first(pairs):
    several = RECORD | {"prompt": "Which?", "images": ["red.png", "red.png"]}
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}]
    for record in (several, several | {"prompt": talk}):
        turns = pairs(record).sample(0).turns
        assert turns[-2].text == "<image>\n<image>\nWhich?" and len(turns[-2].literal) == 0
    for broken in (several | {"prompt": "<image> Which?"}, several | {"prompt": [QUESTION]}):
        with pytest.raises(DataError, match='1 image parts or <image> .* "images" lists 2'):
            pairs(broken)[0]
    seen = [{"role": "assistant", "content": [{"type": "image"}]}]
    with pytest.raises(DataError, match='"chosen" holds .*image.* in its answer; expected'):
        pairs(RECORD | {"chosen": seen})[0]
    with pytest.raises(DataError, match='"rejected" is missing; expected one answer under "rejected" or "reject"'):
        pairs({key: value for key, value in RECORD.items() if key != "rejected"})[0]


def test_earlier_answers_are_prompt(pairs):
    turns = [{"role": "user", "content": "Hi"}, answer("Ho ho."), {"role": "user", "content": "And?"}]
    sample = pairs({"prompt": turns, "chosen": "Yes.", "rejected": "No."})[0]
    supervised = sum(label != IGNORE_INDEX for label in sample.labels)
    assert supervised < sum(sample.branches[1:])
    assert all(label == IGNORE_INDEX for label in sample.labels[: sample.branches[0]])


def test_positions_go_on_where_the_beginning_ends():
    assert pair_positions((3, 2, 4), None).tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6]
    three = torch.arange(7) + torch.tensor([[0], [10], [20]])
    assert pair_positions((3, 2, 4), three)[1].tolist() == [10, 11, 12, 13, 14, 13, 14, 15, 16]


def test_batches_hold_segments_and_branches(pairs):
    dataset = pairs(RECORD, RECORD | {"chosen": "Two cats and a dog, I think."})
    batch = Collator(0)([dataset[0], dataset[1]])
    assert batch.branches == (dataset[0].branches, dataset[1].branches)
    assert batch.segment_ids.sum(1).tolist() == [len(dataset[0].input_ids), len(dataset[1].input_ids)]
    assert (
        batch.position_ids[0, : len(dataset[0].input_ids)].tolist()
        == pair_positions(dataset[0].branches, None).tolist()
    )
    assert batch.supervised == sum(label != IGNORE_INDEX for n in (0, 1) for label in dataset[n].labels)


def test_lengths_count_both_sides(pairs):
    dataset = pairs(RECORD, {"prompt": "Hi", "chosen": "Ho", "rejected": "No"}, measured=True)
    assert np.array_equal(dataset.lengths, [len(dataset[0].input_ids), -len(dataset[1].input_ids)])
    assert dataset.longest == 400
    loader = build_loader(
        dataset,
        consumed_samples=0,
        micro_batch_size=1,
        dp_rank=0,
        dp_size=1,
        seed=1,
        num_workers=0,
        pad_token_id=0,
        options=DataloaderParam(packing=True),
    )
    batch = next(loader)
    assert batch.input_ids.shape == (1, 400) and len(batch.branches) >= 2


LONG = {"prompt": "Hi", "chosen": "Ho " * 300, "rejected": "No"}


def test_too_long(pairs):
    with pytest.raises(DataError, match=r"record 0: its chosen side has \d+ tokens with its images, more than"):
        pairs(LONG)
    with pytest.raises(DataError, match="its rejected side has"):
        pairs(LONG | {"chosen": "No", "rejected": "Ho " * 300})
    kept = pairs(LONG, RECORD, overlong="drop")
    assert len(kept) == 1 and kept[0].media
    cut = pairs(LONG, overlong="truncate")[0]
    assert cut.branches[0] + cut.branches[1] == 200 and cut.branches[2] < 20
    same_when_cut = LONG | {"rejected": "Ho " * 310}
    assert len(pairs(same_when_cut, RECORD, overlong="truncate")) == 1


def test_what_makes_no_pair(pairs, make_config, tokenizer):
    for policy in ("error", "drop"):
        with pytest.raises(DataError, match="answers straight behind an image"):
            pairs(RECORD, template_name="plain", overlong=policy)[0]
    config = make_config([{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}])
    with pytest.raises(ConfigError, match="holds conversations .* but the objective trains on preference records"):
        dataset_of(config, tokenizer, 4, 200, preferences=True)
