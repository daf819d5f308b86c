"""Names of LoRA adapters in the state dict of a model whose decoder the peft library wrapped.

MiniGPT-v2's checkpoint_N.pth has them beside other tensors: `llama_model.base_model.model.` before the decoder's own
name of a module, and `.lora_A.default.weight` or `.lora_B.default.weight` behind it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_NAME = re.compile(
    r"(?P<outer>\w+\.base_model\.model\.)(?P<module>.+)(?P<end>\.lora_(?P<which>[AB])\.(?P<adapter>\w+)\.weight)"
)


class StateName(NamedTuple):
    """The pieces of an adapter's name: what stands before and behind the name of the adapted module, A or B."""

    outer: str
    module: str
    end: str
    which: str


def state_name(name: str) -> StateName | None:
    """The pieces of a name; None where it is not that of an adapter in a state dict."""
    found = _NAME.fullmatch(name)
    return found and StateName(found["outer"], found["module"], found["end"], found["which"])


def written_name(outer: str, module: str, which: str) -> str:
    """The name of A or B of a module behind `outer`, such as `llama_model.`."""
    return f"{outer}base_model.model.{module}.lora_{which}.default.weight"


def is_adapter(name: str) -> bool:
    """Whether a tensor belongs to a LoRA adapter, in whatever file."""
    return ".lora_" in name or name.startswith("lora_")


def state_names(names: Iterable[str]) -> list[str]:
    """Those of some names that are adapters in a state dict."""
    return [name for name in names if is_adapter(name) and state_name(name) is not None]
