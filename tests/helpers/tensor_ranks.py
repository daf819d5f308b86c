"""A process as one rank of a model that is spread, for tests of single modules."""

from __future__ import annotations


def start_rank(tensor: int = 1, pipeline: int = 1) -> int:
    """Set megatron.core up in this process, alone or as a rank of a pool; returns its tensor-parallel rank."""
    from mindspeed_mm.platform import get_platform

    platform = get_platform("cpu")
    from megatron.core import parallel_state, tensor_parallel

    from mindspeed_mm.platform.distributed import init_single_process

    if tensor * pipeline == 1:
        init_single_process(platform)
    elif not parallel_state.model_parallel_is_initialized():  # one call may build several models
        parallel_state.initialize_model_parallel(tensor, pipeline)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
    return parallel_state.get_tensor_model_parallel_rank()
