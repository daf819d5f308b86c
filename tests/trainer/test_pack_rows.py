"""Micro-batches become one row without padding."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from mindspeed_mm.data.collate import Collator
from mindspeed_mm.data.sample import Encoded
from mindspeed_mm.objectives._batches import pack_rows
from tests.planning.planned_run import STAGE_1, STAGE_2
from tests.trainer.test_no_waiting import vlm_and_batch


def config(context=1, tensor=1, sequence=False, virtual=None):
    return SimpleNamespace(
        context_parallel_size=context,
        tensor_model_parallel_size=tensor,
        sequence_parallel=sequence,
        virtual_pipeline_model_parallel_size=virtual,
    )


SAMPLES = [Encoded(str(n), [10 * n + i for i in range(n)], [10 * n + i for i in range(n)]) for n in (3, 5, 2)]


def test_padding_is_left_out():
    batch = Collator(0)(SAMPLES)
    row, lengths = pack_rows(batch, config())
    assert lengths == [3, 5, 2]
    assert row.input_ids.tolist() == [[30, 31, 32, 50, 51, 52, 53, 54, 20, 21]]
    assert row.labels.tolist() == [[31, 32, -100, 51, 52, 53, 54, -100, 21, -100]]
    assert row.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0, 1]]


def test_packed_rows_lose_their_padding_too():
    batch = Collator(0, row_length=9)([SAMPLES[:2], SAMPLES[2:]])
    row, lengths = pack_rows(batch, config())
    assert lengths == [3, 5, 2] and row.input_ids.shape == (1, 10)


def test_ranks_get_equal_slices():
    batch = Collator(0)(SAMPLES)
    row, lengths = pack_rows(batch, config(context=2, tensor=4, sequence=True))
    assert lengths == [3, 5, 2, 6] and row.input_ids.shape == row.labels.shape == row.position_ids.shape == (1, 16)
    assert row.labels[0, 10:].eq(-100).all()
    assert pack_rows(batch, config(tensor=4))[0].input_ids.shape == (1, 10)


def test_virtual_stages_keep_the_length():
    plain = Collator(0)(SAMPLES)
    assert pack_rows(plain, config(virtual=2)) == (plain, None)
    packed = Collator(0, row_length=9)([SAMPLES[:2], SAMPLES[2:]])
    row, lengths = pack_rows(packed, config(virtual=2))
    assert lengths == [3, 5, 1, 2, 7] and row.input_ids.shape == (1, 18)


def test_a_batch_of_unknown_lengths_stays_as_it_is():
    batch = Collator(0)([*SAMPLES, Encoded("empty", [], [])])
    assert torch.equal(pack_rows(batch, config())[0].input_ids, batch.input_ids)


def test_rows_without_padding_stay_as_they_are():
    """Attention takes them at once. Ranks that cannot share their length get one row."""
    batch = Collator(0)([SAMPLES[1], SAMPLES[1]])
    assert pack_rows(batch, config()) == (batch, None)
    assert pack_rows(batch, config(context=5)) == (batch, None)
    row, lengths = pack_rows(batch, config(context=2))
    assert lengths == [5, 5] and row.input_ids.shape == (1, 10)
    packed = Collator(0, row_length=5)([SAMPLES[1:2], SAMPLES[1:2]])
    assert pack_rows(packed, config())[1] == [5, 5]


@pytest.mark.parametrize("trained", [STAGE_1, STAGE_2], ids=["stage 1", "stage 2"])
def test_losses_and_gradients_are_those_of_pack_rows(single_process, trained, monkeypatch):
    from mindspeed_mm.objectives import _batches
    from mindspeed_mm.objectives.sft import OBJECTIVE

    vlm, batch = vlm_and_batch(trained)
    length = min(batch.lengths)
    rows = {name: getattr(batch, name)[:, :length] for name in ("input_ids", "labels", "position_ids")}
    full = dataclasses.replace(batch, **rows, lengths=(length,) * len(batch.lengths))

    def run():
        vlm.zero_grad()
        output, sums = OBJECTIVE.forward(full, vlm)
        sums(output)[0].backward()
        return output.sort().values, [p.grad for p in vlm.parameters() if p.grad is not None]

    assert _batches.pack_rows(full, vlm.config) == (full, None)
    losses, gradients = run()
    monkeypatch.setattr(_batches, "_is_full", lambda *_: False)
    assert _batches.pack_rows(full, vlm.config)[1] == list(full.lengths)
    others, other_gradients = run()
    torch.testing.assert_close(losses, others)
    assert len(gradients) == len(other_gradients) > 0
    for own, other in zip(gradients, other_gradients, strict=True):
        # Sums over all labels: what is small beside the largest of a tensor is rounded by as much as that is.
        torch.testing.assert_close(own, other, rtol=1e-4, atol=2e-6 * other.abs().max().item())
