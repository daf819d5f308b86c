"""What the parts and families say of themselves, known before they are imported.

The `__init__` of a folder of parts or families has a table KNOWN, so that a start imports those of its model and no
others. It repeats what their files say (tests/house/test_known_parts.py compares the two). An implementation that the
table lacks is imported instead.
"""

import importlib
from typing import Any, NamedTuple

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.registry import available, find


class Known(NamedTuple):
    """model_types: HF model_type values that it reads. markers: those of each of its layouts (weights/layouts.py)."""

    model_types: tuple[str, ...] = ()
    markers: tuple[tuple[str, ...], ...] = ()


def said_by(implementation: Any) -> Known:
    """What a Part or a Family says."""
    return Known(tuple(implementation.model_types), tuple(layout.markers for layout in implementation.layouts))


def known(package: str, attribute: str) -> dict[str, Known]:
    """What every implementation of a package says, by its name, sorted. `attribute` as for registry.find."""
    table: dict[str, Known] = importlib.import_module(package).KNOWN
    return {
        name: table[name] if name in table else said_by(find(package, name, attribute)) for name in available(package)
    }


def model_types(kind: str) -> dict[str, str]:
    """The parts' names of one slot by each HF model_type that they read. Raises ConfigError where two claim one."""
    found: dict[str, str] = {}
    for name, said in known(f"mindspeed_mm.models.{kind}", "PART").items():
        for model_type in said.model_types:
            if model_type in found:
                raise ConfigError(
                    f'{kind}: both {found[model_type]} and {name} read model_type "{model_type}"; keep it in one'
                )
            found[model_type] = name
    return found
