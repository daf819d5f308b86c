"""The host never waits for the device inside a micro-batch: what it must know of a batch it finds in host memory."""

import dataclasses
import itertools

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.planning.planned_run import EVERYTHING, STAGE_1, STAGE_2, model
from tests.planning.real_run import Work, batches_of

DEVICE = torch.device("meta")
"""Its tensors have no values: whatever would wait for a value fails."""


class OnlyAsynchronousCopies(TorchFunctionMode):
    """Refuses copies to the device that wait for it to take them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device == DEVICE:
            moved = func is torch.Tensor.to and args[0].device != DEVICE and not (kwargs or {}).get("non_blocking")
            assert not moved and func not in (torch.tensor, torch.as_tensor), f"{func} waits for the device"
        return result


def vlm_and_batch(trained, packed=0):
    from mindspeed_mm.platform import get_platform
    from mindspeed_mm.platform.distributed import init_single_process

    init_single_process(get_platform("cpu"))
    from mindspeed_mm.models.build import build_vlm
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.models.spec import load_model_spec

    spec = load_model_spec(model(trained))
    vlm, _ = build_vlm(spec, Runtime(), torch.device("cpu"))
    return vlm, next(batches_of(Work({}, "", packed=packed), spec, 2, 1))


@pytest.fixture
def meta(monkeypatch):
    """The platform's device has no values."""
    from mindspeed_mm.platform import current_platform

    monkeypatch.setattr(current_platform(), "device", lambda: DEVICE)


@pytest.mark.parametrize(
    "trained",
    [pytest.param(STAGE_1, marks=pytest.mark.slow), pytest.param(STAGE_2, marks=pytest.mark.slow), EVERYTHING],
    ids=["stage 1", "stage 2", "everything"],
)
@pytest.mark.parametrize("packed", [0, 3], ids=["plain", "packed"])
def test_a_micro_batch_never_waits(single_process, meta, trained, packed, monkeypatch):
    from mindspeed_mm.models import loss
    from mindspeed_mm.objectives.sft import OBJECTIVE

    monkeypatch.setattr(loss, "CHUNK", 50)  # pieces, run again in the backward pass
    vlm, batch = vlm_and_batch(trained, packed)
    vlm.text_decoder.rotary._frequencies_on(DEVICE)  # moved once, by the first micro-batch
    vlm = vlm.to(DEVICE)
    with OnlyAsynchronousCopies():
        output, sums = OBJECTIVE.forward(batch, vlm)
        total, count, _ = sums(output)
        total.backward()
    assert total.device == count.device == DEVICE and output.shape == (batch.supervised,)
    assert all(p.grad is not None for p in vlm.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["input_ids", "labels"])
def test_this_would_be_noticed(single_process, meta, name):
    from mindspeed_mm.objectives.sft import OBJECTIVE

    vlm, batch = vlm_and_batch(STAGE_2)
    moved = dataclasses.replace(batch, lengths=(), **{name: getattr(batch, name).to(DEVICE)})
    with pytest.raises(NotImplementedError, match="nonzero"):
        OBJECTIVE.forward(moved, vlm.to(DEVICE))


class ValuesRead(TorchDispatchMode):
    """Counts the values that the host reads from tensors."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_losses_are_read_once_a_step(single_process, monkeypatch):
    """However many micro-batches it has."""
    from megatron.driver import initialize, loop
    from mindspeed_mm.models.build import build_vlm
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.models.spec import load_model_spec
    from mindspeed_mm.objectives import sft
    from mindspeed_mm.objectives.sft import OBJECTIVE
    from tests.helpers.tiny_training import arguments, begin

    # It looks at values, of tensors that are always in host memory.
    monkeypatch.setattr(sft, "pack_rows", lambda batch, config: (batch, None))
    spec = load_model_spec(model(STAGE_2))

    def provide(pre_process, post_process):
        return build_vlm(spec, Runtime(), torch.device("cpu"), pre_process=pre_process, post_process=post_process)[0]

    found = []
    for count in (1, 3):
        args = arguments(batch=(1, count))
        state = begin(args, provide)
        batches = list(itertools.islice(batches_of(Work({}, ""), spec, 1, 1), count))
        data = loop.MeteredIterator(iter(batches), loop.Hooks().describe)
        with loop.StopRequest() as stop, loop.Saver(state, args, loop.Hooks()) as saver, ValuesRead() as read:
            loop.train_step(state, args, OBJECTIVE.forward_step, data, stop, saver)
        found.append(read.number)
        initialize.shutdown()
    assert found[0] == found[1]
