"""Micro-batches become one row without padding."""

from types import SimpleNamespace

import torch

from mindspeed_mm.data.collate import Collator
from mindspeed_mm.data.sample import Encoded
from mindspeed_mm.trainer.step import pack_rows


def config(context=1, tensor=1, sequence=False, virtual=None):
    return SimpleNamespace(
        context_parallel_size=context,
        tensor_model_parallel_size=tensor,
        sequence_parallel=sequence,
        virtual_pipeline_model_parallel_size=virtual,
    )


SAMPLES = [Encoded(str(n), [10 * n + i for i in range(n)], [10 * n + i for i in range(n)]) for n in (3, 5, 2)]


def test_padding_is_left_out():
    batch = Collator(0, (8, 8))(SAMPLES)
    row, lengths = pack_rows(batch, config())
    assert lengths == [3, 5, 2]
    assert row.input_ids.tolist() == [[30, 31, 32, 50, 51, 52, 53, 54, 20, 21]]
    assert row.labels.tolist() == [[31, 32, -100, 51, 52, 53, 54, -100, 21, -100]]
    assert row.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0, 1]]


def test_packed_rows_lose_their_padding_too():
    batch = Collator(0, (8, 8), row_length=9)([SAMPLES[:2], SAMPLES[2:]])
    row, lengths = pack_rows(batch, config())
    assert lengths == [3, 5, 2] and row.input_ids.shape == (1, 10)


def test_ranks_get_equal_slices():
    batch = Collator(0, (8, 8))(SAMPLES)
    row, lengths = pack_rows(batch, config(context=2, tensor=4, sequence=True))
    assert lengths == [3, 5, 2, 6] and row.input_ids.shape == row.labels.shape == row.position_ids.shape == (1, 16)
    assert row.labels[0, 10:].eq(-100).all()
    assert pack_rows(batch, config(tensor=4))[0].input_ids.shape == (1, 10)


def test_virtual_stages_keep_the_length():
    plain = Collator(0, (8, 8))(SAMPLES)
    assert pack_rows(plain, config(virtual=2)) == (plain, None)
    packed = Collator(0, (8, 8), row_length=9)([SAMPLES[:2], SAMPLES[2:]])
    row, lengths = pack_rows(packed, config(virtual=2))
    assert lengths == [3, 5, 1, 2, 7] and row.input_ids.shape == (1, 18)


def test_a_batch_of_unknown_lengths_stays_as_it_is():
    batch = Collator(0, (8, 8))([*SAMPLES, Encoded("empty", [], [])])
    assert torch.equal(pack_rows(batch, config())[0].input_ids, batch.input_ids)
