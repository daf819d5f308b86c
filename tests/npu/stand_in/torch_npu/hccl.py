"""The backend hccl: gloo, without reductions of float64."""

import functools

import torch.distributed

REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "_reduce_scatter_base")


def register():
    torch.distributed.Backend.register_backend("hccl", _create, devices=["cpu", "npu"])
    for name in REDUCTIONS:
        if hasattr(torch.distributed, name):
            setattr(torch.distributed, name, _refusing_float64(getattr(torch.distributed, name)))
    torch.distributed.barrier = _barrier


def _barrier(group=None, async_op=False, device_ids=None):
    """torch's own asks a process group for a device of its kind."""
    return torch.distributed.all_reduce(torch.zeros(1), group=group, async_op=async_op)


def _create(store, rank, size, timeout):
    return torch.distributed.ProcessGroupGloo(store, rank, size, timeout)


def _refusing_float64(function):
    @functools.wraps(function)
    def call(tensor, *args, **options):
        group = options.get("group")
        if tensor.dtype == torch.float64 and torch.distributed.get_backend(group) == "hccl":
            raise RuntimeError(f"HCCL: {function.__name__} does not support float64")
        return function(tensor, *args, **options)

    return call
