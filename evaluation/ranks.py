"""Exchange between the processes of a torchrun launch."""

import datetime
import os
from typing import Any

import torch

from evaluation.engine import Communicator, SingleRank
from mindspeed_mm.platform import get_platform

TIMEOUT = datetime.timedelta(days=30)
"""Ranks wait for the slowest one at the end of a run, which may be long; a rank that dies ends the launch anyway."""


class TorchRanks:
    """Communicator over a CPU group of its own, whatever the device of the model."""

    def __init__(self) -> None:
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._group = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT)

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order; any object that pickles."""
        values = [None] * self.world_size
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values


def connect(device: str | None = None) -> Communicator:
    """Choose the device and join the launch that torchrun described in the environment; a process without one is alone.

    Call before anything that imports megatron.core, such as evaluation.model_engine. Every rank then holds the whole
    model. Raises ConfigError for a device that is not there.
    """
    platform = get_platform(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return SingleRank()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend=platform.backend, timeout=TIMEOUT)
    return TorchRanks()
