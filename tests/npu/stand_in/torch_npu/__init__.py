"""A stand-in for torch_npu, for tests alone: the schemas are torch_npu's, the values are computed on the host.

Importing it changes torch for the whole process, so that only processes of their own do. What it cannot stand in for:
tensors of the device lie in host memory, so a mixture of devices is not noticed, and nothing runs asynchronously.
"""

from __future__ import annotations

import collections
import functools
import logging
import sys
from pathlib import Path

import torch

torch.utils.rename_privateuse1_backend("npu")

from torch_npu import hccl, npu, profiler, reference  # noqa: E402, F401

SCHEMAS = Path(__file__).resolve().parents[3] / "data" / "npu_schemas" / "schemas.txt"

CALLS: collections.Counter[str] = collections.Counter()
"""How often each operator was called."""

_library = torch.library.Library("npu", "DEF")
UNREADABLE = {"npu_max.names_dim", "npu_min.names_dim", "npu_paged_cache_load.out"}
"""Schemas that torch's parser does not read."""


def _counted(name, function):
    @functools.wraps(function)
    def call(*args, **options):
        CALLS[name] += 1
        return function(*args, **options)

    return call


def _define() -> None:
    for line in SCHEMAS.read_text(encoding="utf-8").splitlines():
        name = line.partition("(")[0]
        if name in UNREADABLE:
            continue
        _library.define(line)
        function = reference.OPERATORS.get(name)
        if function is not None:
            _library.impl(name, _counted(name, function), "CompositeImplicitAutograd")


_define()


def __getattr__(name: str):
    """torch_npu.npu_x is torch.ops.npu.npu_x; what no schema has raises."""
    if not name.startswith("npu_") or not hasattr(torch.ops.npu, name):
        raise AttributeError(f"torch_npu has no {name}: it is not in its schemas")
    return getattr(torch.ops.npu, name)


FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace"),
    *("logspace", "normal", "ones", "ones_like", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like"),
    *("randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros", "zeros_like"),
)
METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "to")


def _on_the_host(function):
    """The function, which makes in host memory what it is asked to make on the NPU."""
    moves = function.__name__ == "to"

    @functools.wraps(function)
    def call(*args, **options):
        options = {name: _host(value, name == "device") for name, value in options.items()}
        return function(*(_host(value, moves) for value in args), **options)

    return call


def _host(value, may_be_index=False):
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type in ("npu", "cuda") else value
    if isinstance(value, str):
        return "cpu" if value.partition(":")[0] in ("npu", "cuda") else value
    if may_be_index and type(value) is int:
        return torch.device("cpu")
    return value


for _holder, _names in ((torch, FACTORIES), (torch.Tensor, METHODS)):
    for _name in _names:
        setattr(_holder, _name, _on_the_host(getattr(_holder, _name)))
torch.Tensor.pin_memory = lambda self, *_args, **_options: self

_raw_type = torch.Tensor.type


def _type(self, dtype=None, *args, **options):
    """Names of types, as torch_npu leaves them: "torch.npu.FloatTensor"."""
    if dtype is None:
        return _raw_type(self).replace("torch.", "torch.npu.")
    return _raw_type(self, dtype, *args, **options)


torch.Tensor.type = _type
torch.Tensor.npu = lambda self, *_args, **_options: self
torch.npu = sys.modules["torch.npu"] = npu
torch._register_device_module("npu", npu) if not hasattr(torch, "npu") else None
hccl.register()
# The card's generator is the host's here, which megatron.core would warn of.
logging.getLogger("megatron.core.tensor_parallel.random").addFilter(lambda record: "CPU RNG" not in record.getMessage())
