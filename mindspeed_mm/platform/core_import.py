"""Changes to megatron.core while its modules are imported, so that no call is patched later."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import types
from collections.abc import Callable, Mapping

import numpy

PACKAGE = "megatron.core"

Rewrite = Callable[[types.CodeType], types.CodeType]
Adapt = Callable[[types.ModuleType], None]


def rewritten(code: types.CodeType, names: Mapping[str, str], constants: Mapping[str, str]) -> types.CodeType:
    """The code with names and string constants replaced, in nested code as well.

    Imports such as `from torch.cuda import x` keep working: their module name is left alone.
    """

    def constant(value: object) -> object:
        if isinstance(value, types.CodeType):
            return rewritten(value, names, constants)
        if isinstance(value, tuple):
            return tuple(constant(item) for item in value)
        return constants.get(value, value) if isinstance(value, str) else value

    new_names = tuple(names.get(name, name) for name in code.co_names)
    return code.replace(co_names=new_names, co_consts=tuple(constant(value) for value in code.co_consts))


class _CoreLoader(importlib.machinery.SourceFileLoader):
    rewrite: Rewrite
    after: Mapping[str, Adapt]

    def get_code(self, fullname: str) -> types.CodeType | None:
        code = super().get_code(fullname)
        return None if code is None else self.rewrite(code)

    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        adapt = self.after.get(module.__name__)
        if adapt is not None:
            adapt(module)


class CoreFinder(importlib.abc.MetaPathFinder):
    """Put first on sys.meta_path: hands modules of megatron.core to a loader that changes them."""

    def __init__(self, rewrite: Rewrite, after: Mapping[str, Adapt]) -> None:
        """`rewrite` changes each module's code; `after` holds by module name what is done when it has run."""
        self._rewrite, self._after = rewrite, after

    def find_spec(self, fullname, path=None, target=None):
        if fullname != PACKAGE and not fullname.startswith(PACKAGE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            loader = _CoreLoader(spec.loader.name, spec.loader.path)
            loader.rewrite, loader.after = self._rewrite, self._after
            spec.loader = loader
        return spec


def without_compiler(module: types.ModuleType) -> None:
    """For megatron.core.jit: core wraps 38 functions in torch.compile at import, which loads the compiler.

    0.16 has disable_jit_fuser for that, older versions lack it.
    """
    module.jit_fuser = lambda function: function


def without_fp8(module: types.ModuleType) -> None:
    """For megatron.core.fp8_utils: in 0.12 the distributed optimizer quantises its FP8 parameters at every step, and
    fails where Transformer Engine is not installed, although there are none."""
    if "_quantize_param_shard_impl" in vars(module) and not module.HAVE_TE:
        module._quantize_param_shard_impl = lambda *_parameters: None


USES_NUMPY = ("mapping", "validation", "exchange_utils")
"""Modules of megatron.core.dist_checkpointing for `with_product`."""


def with_product(module: types.ModuleType) -> None:
    """For modules of megatron.core.dist_checkpointing: 0.12 calls numpy.product, which numpy 2 has no more."""
    if not hasattr(numpy, "product"):
        module.np = types.SimpleNamespace(**{**vars(numpy), "product": numpy.prod})


def forget_ranks(module: types.ModuleType) -> None:
    """For megatron.core.parallel_state: 0.12 keeps two lists of ranks when groups are destroyed, and takes the next
    groups for those."""
    destroy = module.destroy_model_parallel

    def destroy_all() -> None:
        destroy()
        module._EMBEDDING_GLOBAL_RANKS = module._POSITION_EMBEDDING_GLOBAL_RANKS = None

    module.destroy_model_parallel = destroy_all


def use_adam(module: types.ModuleType, adamw: Callable) -> None:
    """For megatron.core.optimizer: build `adamw`, called with the arguments of torch.optim.AdamW.

    Core has a branch for torch's optimizer, which takes torch.optim.AdamW by name, and one for kernels of others.
    """

    def build(*args, adam_w_mode: bool = True, **kwargs):
        return adamw(*args, **kwargs)

    module.USING_PYTORCH_OPTIMIZER = False
    module.Adam = build
