"""A field of a dataclass that is one command-line flag."""

from __future__ import annotations

import dataclasses
from typing import Any


def flag(kind: type, default: Any, group: str, text: str, choices: tuple | None = None) -> Any:
    """The field of a flag with a value of type `kind`, in a group of --help."""
    return dataclasses.field(default=default, metadata={"kind": kind, "group": group, "help": text, "choices": choices})


def switch(group: str, text: str) -> Any:
    """The field of a flag without a value."""
    return flag(bool, False, group, text)
