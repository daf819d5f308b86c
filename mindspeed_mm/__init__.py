"""mindspeed-mm: multimodal LLMs of the LLaVA family on Megatron-Core, on NPU, GPU and CPU.

`import mindspeed_mm as mm` is light; what a name needs is imported when it is first used.
"""

import importlib
import importlib.abc
import importlib.util
import sys

__version__ = "0.1.0"

_EXPORTS = {
    "load": "mindspeed_mm.inference.api",
    "convert": "mindspeed_mm.inference.api",
    "load_tokenizer": "mindspeed_mm.data.tokenizer",
    "encode": "mindspeed_mm.data.encode",
    "render": "mindspeed_mm.data.rendering",
    "preprocess": "mindspeed_mm.data.image",
    "score": "evaluation.score",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mindspeed_mm' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _PlatformFirst(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Chooses the default platform before the first import of megatron.core, where nobody has chosen one.

    The platform adapts megatron.core while that is imported. So a program may import the modules of this package that
    build on megatron.core in any order; one that wants another device calls `get_platform(device)` before.
    """

    def find_spec(self, name, path=None, target=None):
        if name != "megatron.core":
            return None
        sys.meta_path.remove(self)
        importlib.import_module("mindspeed_mm.platform").current_platform()
        if name not in sys.modules:  # the platform leaves megatron.core as it is
            return None
        self._spec = sys.modules[name].__spec__
        return importlib.util.spec_from_loader(name, self)

    def create_module(self, spec):
        return sys.modules[spec.name]

    def exec_module(self, module):
        module.__spec__ = self._spec  # the platform has imported the module already


if "megatron.core" not in sys.modules:
    sys.meta_path.insert(0, _PlatformFirst())
