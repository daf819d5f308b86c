"""Names in weight rules: those of layers hold a number; those that do not match are told with the nearest."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable

MAX_LISTED_NAMES = 8
"""Names shown per list in an error; the rest is counted."""


_NUMBERS = {"{}": (0, 1), "{layer+1}": (1, 1), "{2*layer}": (0, 2)}
"""What stands for the number of a layer, which is written as first + step * layer."""


def is_layered(name: str) -> bool:
    """Whether a name of a rule holds a layer number."""
    return any(text in name for text in _NUMBERS)


def layer_of(pattern: str, name: str) -> int | None:
    """The layer whose number makes `name` of a rule's `pattern`, None where no number does."""
    found = _matcher(pattern).fullmatch(name)
    if found is None:
        return None
    first, step = next(numbers for text, numbers in _NUMBERS.items() if text in pattern)
    layer, rest = divmod(int(found[1]) - first, step)
    return layer if layer >= 0 and not rest else None


@functools.lru_cache(maxsize=256)
def _matcher(pattern: str) -> re.Pattern[str]:
    text = re.escape(pattern)
    for number in _NUMBERS:
        text = text.replace(re.escape(number), "([0-9]+)")
    return re.compile(text)


def fill(name: str, layer: int | None) -> str:
    """A name of a rule with the layer's number in its place; None: as it is."""
    for text, (first, step) in _NUMBERS.items() if layer is not None else ():
        name = name.replace(text, str(first + step * layer))
    return name


def mismatch(where: str, missing: list[str], unknown: list[str], hints: Iterable[str] = ()) -> str:
    """The message about names that are missing and names that nothing asks for; `hints` replace the general advice."""
    lines = [f"{where}: the tensors are not those that the model needs."]
    if missing:
        lines.append(f"missing ({len(missing)}): {_shorten(missing)}")
    if unknown:
        shown = []
        for name in unknown[:MAX_LISTED_NAMES]:
            close = difflib.get_close_matches(name, missing, n=1, cutoff=0.6)
            shown.append(f"{name} (nearest missing: {close[0]})" if close else name)
        rest = f" and {len(unknown) - len(shown)} more" if len(unknown) > len(shown) else ""
        lines.append(f"unknown ({len(unknown)}): {', '.join(shown)}{rest}")
    lines += hints or ["Correct the model spec (layers, biases, tied head) or give the weights of this model."]
    return "\n  ".join(lines)


def _shorten(names: list[str]) -> str:
    shown = ", ".join(names[:MAX_LISTED_NAMES])
    return shown if len(names) <= MAX_LISTED_NAMES else f"{shown} and {len(names) - MAX_LISTED_NAMES} more"
