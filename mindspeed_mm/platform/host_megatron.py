"""Lets megatron.core, which is written for CUDA, run on the CPU.

megatron.core asks for memory with `device="cuda"`, calls `torch.cuda.*` and `tensor.cuda()`, and compares
`tensor.type()` with "torch.cuda.FloatTensor". When one of its modules is imported, the name `cuda` is replaced by
`cpu` in the compiled code: `torch.cpu` mirrors most of `torch.cuda`, and `Tensor.cpu` is what `.cuda()` has to be here.
Nothing is patched per call, torch.cuda stays as it is for everybody else, and the byte-code cache keeps working.
What `torch.cpu` lacks is added to it below, once, and only where it is missing.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import types

import torch

from mindspeed_mm.platform import core_versions
from mindspeed_mm.platform.core_import import (
    PACKAGE,
    USES_NUMPY,
    CoreFinder,
    forget_ranks,
    rewritten,
    use_adam,
    with_product,
    without_compiler,
    without_fp8,
)
from mindspeed_mm.platform.host_adamw import HostAdamW
from mindspeed_mm.platform.host_linear import linear

TYPE_NAMES = {
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}


def rewrite(code: types.CodeType) -> types.CodeType:
    """Replace the device `cuda` by `cpu` in names, constants and nested code of a code object."""
    return rewritten(code, {"cuda": "cpu"}, {"cuda": "cpu"} | TYPE_NAMES)


class _HostFinder(CoreFinder):
    """Lets megatron.core run on the CPU."""


def _adapt_random(module: types.ModuleType) -> None:
    """The model-parallel RNG tracker switches torch's CPU generator here; core would warn that it moves."""
    module._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    module._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    logging.getLogger(module.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _adapt_grad_scaler(module: types.ModuleType) -> None:
    """Resuming calls tensor.cuda(device); Tensor.cpu, which takes its place, has no such argument."""

    def load_state_dict(self, state_dict: dict) -> None:
        self._scale = state_dict["scale"].cpu()
        self._growth_tracker = state_dict["growth_tracker"]
        self._hysteresis_tracker = state_dict["hysteresis_tracker"]

    module.DynamicGradScaler.load_state_dict = load_state_dict


def _adapt_linear(module: types.ModuleType) -> None:
    """Core's linear layers multiply by our kernel, its mappings communicate: on the CPU the two never overlap."""

    grouped = core_versions.takes(module.copy_to_tensor_model_parallel_region, "group")

    def product(
        input, weight, bias, gradient_accumulation_fusion, allreduce_dgrad, sequence_parallel, tp_group=None, **_unused
    ):
        if sequence_parallel:
            input = module.gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = module.copy_to_tensor_model_parallel_region(input, **({"group": tp_group} if grouped else {}))
        return linear(input, weight, bias)

    module.linear_with_grad_accumulation_and_async_allreduce = product
    module.linear_with_frozen_weight = product


def _adapt_optimizer(module: types.ModuleType) -> None:
    """One pass over memory for each parameter instead of ten, and no compiler loaded."""
    use_adam(module, HostAdamW)


_AFTER_IMPORT = {
    f"{PACKAGE}.jit": without_compiler,
    **dict.fromkeys((f"{PACKAGE}.dist_checkpointing.{name}" for name in USES_NUMPY), with_product),
    f"{PACKAGE}.fp8_utils": without_fp8,
    f"{PACKAGE}.parallel_state": forget_ranks,
    f"{PACKAGE}.tensor_parallel.random": _adapt_random,
    f"{PACKAGE}.optimizer.grad_scaler": _adapt_grad_scaler,
    f"{PACKAGE}.tensor_parallel.layers": _adapt_linear,
    f"{PACKAGE}.optimizer": _adapt_optimizer,
}


def _no_bytes(*_args, **_kwargs) -> int:
    return 0


def _nothing(*_args, **_kwargs) -> None:
    return None


class _Stream:
    """A stream of the CPU: everything queued on it has already run."""

    def wait_stream(self, _other: object) -> None:
        return None

    def synchronize(self) -> None:
        return None


_STREAM = _Stream()
_HOST_API = {
    "manual_seed": torch.manual_seed,
    "manual_seed_all": torch.manual_seed,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    "memory_allocated": _no_bytes,
    "max_memory_allocated": _no_bytes,
    "memory_reserved": _no_bytes,
    "max_memory_reserved": _no_bytes,
    "memory_stats": lambda device=None: {},
    "empty_cache": _nothing,
    "reset_peak_memory_stats": _nothing,
    "is_current_stream_capturing": lambda: False,
    "default_stream": lambda device=None: _STREAM,
    "get_device_capability": lambda device=None: (0, 0),
    "FloatTensor": torch.FloatTensor,
    "HalfTensor": torch.HalfTensor,
    "BFloat16Tensor": torch.BFloat16Tensor,
}


def _extend_torch_cpu() -> None:
    for name, value in _HOST_API.items():
        if not hasattr(torch.cpu, name):
            setattr(torch.cpu, name, value)

    def from_cuda(name: str) -> object:
        """Types and helpers that are only named, never used on the CPU (torch.cuda.Event in an annotation)."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(torch.cuda, name)

    torch.cpu.__getattr__ = from_cuda


@contextlib.contextmanager
def _quiet_import():
    """megatron.core logs the absence of optional CUDA kernels at import."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def install() -> None:
    """Put the redirection in place. Idempotent.

    Raises:
        RuntimeError: megatron.core was imported before, so that its modules still want CUDA.
    """
    if any(isinstance(finder, _HostFinder) for finder in sys.meta_path):
        return
    if PACKAGE in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before the platform was chosen: call mindspeed_mm.platform.get_platform() first"
        )
    _extend_torch_cpu()
    sys.meta_path.insert(0, _HostFinder(rewrite, _AFTER_IMPORT))
    with _quiet_import():
        importlib.import_module(PACKAGE)
