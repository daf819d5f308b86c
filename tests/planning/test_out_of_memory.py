"""A full memory: what the message says, and that the run ends with it."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mindspeed_mm.errors import TrainingError, add_note
from tests.planning.planned_run import model, planned
from tests.planning.real_run import Work

RUN = Work(model(), "--bf16 --micro-batch-size 4 --global-batch-size 64", 8)


class FullPlatform:
    """A device that can write a snapshot."""

    name = "cuda"

    def memory_snapshot(self, path: Path) -> bool:
        path.write_bytes(b"snapshot")
        return True


def training(job, save=None, platform=None):
    """What the context needs to know of a run."""
    from mindspeed_mm.platform import get_platform

    args = SimpleNamespace(
        seq_length=192,
        save=save,
        micro_batch_size=4,
        num_micro_batches=2,
        data_parallel_size=8,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        num_virtual_stages_per_pipeline_rank=None,
        context_parallel_size=1,
        sequence_parallel=False,
        bf16=True,
        fp16=False,
        use_distributed_optimizer=False,
        num_workers=2,
        optimizer="adam",
        ema_decay=None,
    )
    loading = SimpleNamespace(packing=False, packing_length=None)
    config = SimpleNamespace(dataloader_param=loading)
    return SimpleNamespace(args=args, spec=job.spec, data_config=config, platform=platform or get_platform("cpu"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_message(error):
    job = planned(RUN)
    from mindspeed_mm.trainer.out_of_memory import explaining_out_of_memory

    with (
        pytest.raises(TrainingError, match="the memory of cpu is full") as caught,
        explaining_out_of_memory(training(job)),
    ):
        add_note(error, "The last to go into the model: row-3")
        raise error
    message = str(caught.value)
    assert "\n  The last to go into the model: row-3\n" in message
    assert str(error).splitlines()[0] in message
    assert all(f"\n  {number}. " in message for number in (1, 2, 3))
    assert "4. " not in message
    assert "snapshot" not in message


def test_snapshot(tmp_path):
    job = planned(RUN)
    from mindspeed_mm.trainer.out_of_memory import explaining_out_of_memory

    run = training(job, str(tmp_path), FullPlatform())
    with pytest.raises(TrainingError, match="out_of_memory_rank0.pickle"), explaining_out_of_memory(run):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert (tmp_path / "out_of_memory_rank0.pickle").read_bytes() == b"snapshot"


def test_other_errors_stay():
    job = planned(RUN)
    from mindspeed_mm.trainer.out_of_memory import explaining_out_of_memory

    with pytest.raises(RuntimeError, match="shapes differ"), explaining_out_of_memory(training(job)):
        raise RuntimeError("shapes differ")


def test_remedies_save_memory_and_the_cheapest_comes_first():
    job = planned(RUN)
    from mindspeed_mm.planning.memory import peak_memory
    from mindspeed_mm.trainer.out_of_memory import _seconds, remedies

    found = remedies(job)
    assert len(found) == 3
    assert all(peak_memory(remedy.job).peak < 0.95 * peak_memory(job).peak for remedy in found)
    assert all(remedy.job.global_batch_size == job.global_batch_size for remedy in found)
    assert all(remedy.job.world_size == job.world_size for remedy in found)
    costs = [_seconds(remedy.job) for remedy in found]
    assert costs == sorted(costs)


def test_nothing_left_to_change():
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    job = planned(Work(model(**full), "--bf16"))
    from mindspeed_mm.trainer.out_of_memory import remedies

    job = dataclasses.replace(job, micro_batch_size=1)
    assert [remedy.text for remedy in remedies(job)] == []
