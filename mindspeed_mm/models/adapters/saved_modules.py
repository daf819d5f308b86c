"""Whole modules that are trained beside adapters and go with them: PEFT's modules_to_save (a head, an embedding).

A lora block names them by Hugging Face's names. For training each becomes a rule of the part's `parameters`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.adapters.targets import DIALECT
from mindspeed_mm.weights.rules import Rule

ENDS = (".weight", ".bias")
TIES = "share_embeddings_and_output_weights"
"""Key of a decoder's block: its head is its embedding."""


def with_opened(block: dict[str, Any], part: Any) -> dict[str, Any]:
    """A part's block of a model.json whose rules open what its lora block names in modules_to_save.

    Raises ConfigError for a name that fits no module of its own.
    """
    lora = block.get("lora")
    modules = lora.get("modules_to_save") if isinstance(lora, dict) else None
    rules = block.get("parameters", [])
    if not modules or not isinstance(modules, list) or not isinstance(rules, list):
        return block  # what is no list of names the schema refuses
    tied = part.rules[DIALECT].tied_sources() if block.get(TIES) is True and DIALECT in part.rules else None
    for module in modules if tied else ():
        if is_of(tied[0][0], module):
            raise ConfigError(
                f"{part.kind}.lora.modules_to_save: found {module!r}, which is the embedding here ({TIES} true); "
                f"expected {module_of(tied[1][0]).rpartition('.')[2]}, which trains both. Correct it"
            )
    held = {rule.get("names") for rule in rules if isinstance(rule, dict) and rule.get("freeze") is False}
    names = dict.fromkeys(name for module in modules for name in _targets(part, module))
    return block | {"parameters": [*({"names": name, "freeze": False} for name in names if name not in held), *rules]}


def saved_tensors(part: Any, spec: Any, get: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face's name, value) of the modules that a lora block saves; `get` gives our tensors by name. A tied head
    is saved with its embedding, since PEFT unties them."""
    wanted, tied = spec.lora.modules_to_save, tied_names(part, spec)
    for step in part.rules[DIALECT].steps(spec.geometry):
        if not step.unused and any(is_of(name, module) for name in step.sources for module in wanted):
            yield from zip(step.sources, step.rule.to_theirs(get(step.target), spec.geometry), strict=True)
            if tied and tied[1] in step.sources:
                yield tied[0], get(step.target)


def _targets(part: Any, module: Any) -> list[str]:
    """Patterns of our parameters' names that make a module."""
    known = [rule for rule in part.rules[DIALECT].rules if isinstance(rule, Rule)] if DIALECT in part.rules else []
    alone = [rule for rule in known if len(rule.sources) == 1 and not rule.unused]
    found = [rule.target.replace("{}", "*") for rule in alone if is_of(rule.sources[0], module)]
    if not found:
        names = dict.fromkeys(module_of(rule.sources[0]).rpartition(".")[2] for rule in alone)
        raise ConfigError(
            f"{part.kind}.lora.modules_to_save: found {module!r}, which is no module of its own here; expected some of "
            f"{', '.join(names) or 'none'}. Correct it, or adapt it instead"
        )
    return found


def module_of(name: str) -> str:
    """The module of a tensor, by its whole name."""
    return next((name.removesuffix(end) for end in ENDS if name.endswith(end)), name)


def is_of(name: str, module: Any) -> bool:
    """Whether a tensor belongs to a module that is named by the end of its name (PEFT's rule)."""
    own = module_of(name)
    return own == module or own.endswith(f".{module}")


def tied_names(part: Any, spec: Any) -> tuple[str, str] | None:
    """Hugging Face's names of the head and the embedding of a part that ties them; None for other parts."""
    names = part.rules[DIALECT].tied_sources() if DIALECT in part.rules and spec.geometry.tied else None
    return None if names is None else (names[0][0], names[1][0])
