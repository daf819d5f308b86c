"""`--cfg-options model.a.b=v data.c[0].d=w`: values of the files that the command line changes."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import re
from collections.abc import Iterable
from typing import Any

from mindspeed_mm.config.load import parse_json
from mindspeed_mm.errors import ConfigError

FILES = {"model": "--mm-model", "data": "--mm-data"}
"""The first name of an option, and the flag of the file that it changes."""

EXPECTED = "expected model.KEY=VALUE or data.KEY=VALUE, such as model.text_decoder.freeze=true"


@dataclasses.dataclass(frozen=True)
class Change:
    """One option: its text, the keys and list indices that lead to the value, and the value as JSON text."""

    text: str
    keys: tuple[str, ...]
    value: str

    @property
    def name(self) -> str:
        """The option without its value, for errors."""
        return "--cfg-options " + self.text.partition("=")[0]


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """A file and the changes of the command line to it. Goes wherever the path of one of the suite's files goes."""

    path: str
    changes: tuple[Change, ...] = ()

    def __str__(self) -> str:
        return self.path + (" with --cfg-options" if self.changes else "")


def take_options(namespace: argparse.Namespace) -> None:
    """Join --cfg-options to the files: namespace.mm_model and mm_data become ConfigFile where options change them.

    Raises ConfigError: an option without a value or a file, one of a file that is not given, a key given twice.
    """
    found: dict[str, list[Change]] = {name: [] for name in FILES}
    for text in namespace.cfg_options or ():
        name, change = _read(text)
        if change.keys in [other.keys for other in found[name]]:
            raise ConfigError(f"{change.name} is given twice: keep one of them")
        found[name].append(change)
    for name, flag in FILES.items():
        attribute = flag[2:].replace("-", "_")
        path = getattr(namespace, attribute)
        if found[name] and path is None:
            raise ConfigError(f"{found[name][0].name} changes the file of {flag}, which is not given: add {flag}")
        if found[name]:
            setattr(namespace, attribute, ConfigFile(str(path), tuple(found[name])))


def changed(values: dict[str, Any], changes: Iterable[Change]) -> dict[str, Any]:
    """A copy of `values` with the changes made, in their order. What is new in it, the file's schema checks.

    Raises ConfigError: an index that is none or out of range, a key below something that is no object.
    """
    values = copy.deepcopy(values)
    for change in changes:
        holder: Any = values
        for depth, key in enumerate(change.keys):
            place = _place(holder, key, change, ".".join(change.keys[:depth]))
            if depth == len(change.keys) - 1:
                holder[place] = json.loads(change.value)
                break
            if isinstance(holder, dict) and holder.get(place) is None:
                holder[place] = {}
            holder = holder[place]
    return values


def _read(text: str) -> tuple[str, Change]:
    """(which file, change) of one option."""
    path, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f'--cfg-options "{text}" has no value: {EXPECTED}')
    name, *keys = re.sub(r"\[(\d+)\]", r".\1", path).split(".")
    if name not in FILES:
        raise ConfigError(f'--cfg-options "{text}" begins with "{name}", which is no file: {EXPECTED}')
    if not keys or "" in keys:
        raise ConfigError(f'--cfg-options "{text}" has an empty key: {EXPECTED}')
    try:
        parsed = parse_json(value)
    except json.JSONDecodeError:
        parsed = value
    except (ValueError, RecursionError) as error:
        raise ConfigError(f'--cfg-options "{path}": {error}') from error
    return name, Change(text, tuple(keys), json.dumps(parsed))


def _place(holder: Any, key: str, change: Change, where: str) -> str | int:
    """The key or index by which `holder`, found at `where`, is entered."""
    if isinstance(holder, dict):
        return key
    if not isinstance(holder, list):
        raise ConfigError(f"{change.name}: {where} is {holder!r}, which holds no {key}; correct the option")
    if not re.fullmatch(r"[0-9]+", key) or int(key) >= len(holder):
        raise ConfigError(
            f"{change.name}: {where} is a list of {len(holder)}, found {key}; expected an index from 0 to "
            f"{len(holder) - 1}, or the whole list as JSON"
        )
    return int(key)
