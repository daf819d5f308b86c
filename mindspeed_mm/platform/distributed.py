"""Process groups of a launch, and of a single process, so that parallel modules work outside torchrun."""

from __future__ import annotations

import datetime
import os
import socket
import time

import torch

from mindspeed_mm.errors import LostRankError
from mindspeed_mm.platform.base import Platform

MEETING_SECONDS = 300.0
"""In which rank 0 must answer."""

ONE_TRY = 1.0
BETWEEN_TRIES = 0.1
"""Seconds."""


def unreachable(host: str, port: int, seconds: float) -> OSError | UnicodeError | None:
    """Waits until somebody listens there; why nobody does where `seconds` are over.

    torch's own wait for a store goes on for minutes after Ctrl-C; this one ends at once.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=min(ONE_TRY, seconds)).close()
            return None
        except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host can be so
            if time.monotonic() + BETWEEN_TRIES > end:
                return error
        time.sleep(BETWEEN_TRIES)


def no_first_rank(rank: str | None, host: str, port: int, seconds: float, cause: str) -> str:
    """What a rank says that cannot reach rank 0."""
    return (
        f"rank {rank} on {socket.gethostname()} cannot reach rank 0 at {host}:{port} within {seconds:g} s: {cause}. "
        "See whether rank 0 has started and has not ended. Check MASTER_ADDR, MASTER_PORT and the network"
    )


def meet(platform: Platform, timeout: datetime.timedelta | None = None, seconds: float = MEETING_SECONDS) -> None:
    """Join the process group that torchrun's environment describes; `timeout` is that of its collectives.

    Raises:
        LostRankError: nobody answers at MASTER_ADDR:MASTER_PORT within `seconds`.
    """
    rank, host, port = (os.environ.get(name) for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    if rank not in (None, "0") and host and (port or "").isdecimal():  # torch says what is missing or wrong
        problem = unreachable(host, int(port), seconds)
        if problem is not None:
            raise LostRankError(no_first_rank(rank, host, int(port), seconds, str(problem)))
    torch.distributed.init_process_group(platform.backend, timeout=timeout)
    platform.settle()


def init_single_process(platform: Platform, seed: int = 1234) -> None:
    """Make this process a world of one, unless process groups exist already.

    megatron.core's layers ask for tensor-parallel groups and for its RNG tracker even when nothing is parallel. No
    network port is opened.
    """
    from megatron.core import parallel_state, tensor_parallel

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(platform.backend, store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
