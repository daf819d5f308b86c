"""What megatron.core needs on an NPU besides the redirection of torch.cuda, where MindSpeed is not there to do it.

transfer_to_npu redirects calls. Three things it leaves: the optimizers compare `tensor.type()`, which is
"torch.npu.FloatTensor" there, with "torch.cuda.FloatTensor"; the tracker of random states reaches into torch.cuda's
private functions; and 38 functions are wrapped in torch.compile, which has no compiler for the NPU.
"""

from __future__ import annotations

import importlib
import sys
import types

import torch

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
from mindspeed_mm.platform.npu_adamw import NpuAdamW

TYPE_NAMES = {
    "torch.cuda.FloatTensor": "torch.npu.FloatTensor",
    "torch.cuda.HalfTensor": "torch.npu.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.npu.BFloat16Tensor",
}


def rewrite(code: types.CodeType) -> types.CodeType:
    """Replace the names of tensor types."""
    return rewritten(code, {}, TYPE_NAMES)


def _adapt_random(module: types.ModuleType) -> None:
    module._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.npu.get_rng_state()
    module._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.npu.set_rng_state(new_state)


_AFTER_IMPORT = {
    f"{PACKAGE}.jit": without_compiler,
    **dict.fromkeys((f"{PACKAGE}.dist_checkpointing.{name}" for name in USES_NUMPY), with_product),
    f"{PACKAGE}.fp8_utils": without_fp8,
    f"{PACKAGE}.parallel_state": forget_ranks,
    f"{PACKAGE}.tensor_parallel.random": _adapt_random,
    f"{PACKAGE}.optimizer": lambda module: use_adam(module, NpuAdamW),
}


def install() -> None:
    """Put the changes in place. Idempotent.

    Raises:
        RuntimeError: megatron.core was imported before, so that its modules lack them.
    """
    if any(isinstance(finder, CoreFinder) for finder in sys.meta_path):
        return
    if PACKAGE in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before the platform was chosen: call mindspeed_mm.platform.get_platform() first"
        )
    sys.meta_path.insert(0, CoreFinder(rewrite, _AFTER_IMPORT))
    importlib.import_module(PACKAGE)
