"""Process groups for a single process, so that parallel modules work outside torchrun."""

from __future__ import annotations

import torch

from mindspeed_mm.platform.base import Platform


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
