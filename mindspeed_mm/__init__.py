"""mindspeed-mm: multimodal LLMs of the LLaVA family on Megatron-Core, on NPU, GPU and CPU.

`import mindspeed_mm as mm` is light; what a name needs is imported when it is first used.
"""

import importlib

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
