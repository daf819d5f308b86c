"""Exchange between the processes of a torchrun launch, and which of them hold one copy of the model."""

import datetime
import os
from typing import Any

import torch
from torch.distributed import PrefixStore

from evaluation.engine import Communicator, SingleRank
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.platform import get_platform
from mindspeed_mm.platform.distributed import meet

TIMEOUT = datetime.timedelta(days=30)
"""Ranks wait for the slowest one at the end of a run, which may be long; a rank that dies ends the launch anyway."""


class TorchRanks:
    """Communicator over a CPU group of its own, whatever the device of the model."""

    def __init__(self) -> None:
        from megatron.core import parallel_state

        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.replica, self.replicas, self.is_leader = self.rank, self.world_size, True
        if parallel_state.model_parallel_is_initialized():
            self.replica = parallel_state.get_data_parallel_rank()
            self.replicas = parallel_state.get_data_parallel_world_size()
            self.is_leader = (
                parallel_state.get_tensor_model_parallel_rank() == 0
                and parallel_state.get_pipeline_model_parallel_rank() == 0
            )
        # The ranks met at this store. It is asked for a number without waiting for any of them.
        self._store = PrefixStore("evaluation", torch.distributed.distributed_c10d._get_default_store())
        self._group = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT)

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order; any object that pickles."""
        values = [None] * self.world_size
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values

    def count(self, answers: int) -> int:
        """See Communicator."""
        return self._store.add("answers", answers)


def connect(device: str | None = None, tensor: int = 1, pipeline: int = 1) -> Communicator:
    """Choose the device and join the launch that torchrun described in the environment; a process without one is alone.

    Each copy of the model takes `tensor` x `pipeline` ranks, and there are as many copies as fit.

    Call before anything that imports megatron.core, such as evaluation.model_engine. Raises ConfigError for a device
    that is not there, or a number of processes that is no multiple of a copy's.
    """
    platform = get_platform(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if min(tensor, pipeline) < 1 or size % (tensor * pipeline):
        raise ConfigError(
            f"tensor-parallel size {tensor} and pipeline-parallel size {pipeline} need a multiple of "
            f"{tensor * pipeline} processes, found {size}: start with torchrun --nproc_per_node {tensor * pipeline}"
        )
    if size == 1:
        return SingleRank()
    if not torch.distributed.is_initialized():
        meet(platform, TIMEOUT)
    if tensor * pipeline > 1:
        _join_copies(tensor, pipeline)
    return TorchRanks()


def _join_copies(tensor: int, pipeline: int) -> None:
    from megatron.core import parallel_state, tensor_parallel

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor, pipeline)
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
