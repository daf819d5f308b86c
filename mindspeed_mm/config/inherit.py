"""Files of the suite that begin from others (`_base_`) and values that the command line changes (`--cfg-options`).

Only the suite's own files are read so: a public config.json or tokenizer.json has no bases.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mindspeed_mm.config.load import read_json
from mindspeed_mm.config.options import ConfigFile, changed
from mindspeed_mm.errors import ConfigError

BASE = "_base_"
"""A path or a list of paths, relative to the file that names them."""

DELETE = "_delete_"
"""In an object: true takes its place whole, instead of being merged into that of the base."""

MAX_FILES = 64
"""Files that one configuration may be made of; a file counts each time that it is named."""


def read_config(source: str | Path | ConfigFile, read: Callable[[Path], dict[str, Any]] = read_json) -> dict[str, Any]:
    """The JSON object of one of the suite's files, its bases merged in and the command line's changes made.

    Objects are merged key by key, all else replaces what the base has. A later base wins over an earlier one, the
    file over all of them. The result has no `_base_` and no `_delete_`. `read` reads files of another form.

    Raises ConfigError: as read_json for each of the files; a circle of files, a base that is no path, too many files,
    an object in the place of something else, a `_delete_` that replaces nothing; a change that cannot be made.
    """
    file = source if isinstance(source, ConfigFile) else ConfigFile(str(source))
    try:
        return changed(_Reading(read).of(Path(file.path), ()), file.changes)
    except RecursionError as error:
        raise ConfigError(f"{file.path} is not a configuration: it is nested too deeply.") from error


class _Reading:
    """One configuration that is read."""

    def __init__(self, read: Callable[[Path], dict[str, Any]]) -> None:
        self._read = read
        self.files = 0

    def of(self, path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
        """The values of a file; `below` are the files that led to it."""
        self.files += 1
        if self.files > MAX_FILES:
            raise ConfigError(f"more than {MAX_FILES} files are named by {BASE}; expected fewer: join some of them")
        own = self._read(path)
        chain = (*below, path.resolve())
        merged: dict[str, Any] = {}
        for where, base in _bases(path, own.pop(BASE, [])):
            if base.resolve() in chain:
                circle = " -> ".join(str(file) for file in (*chain, base.resolve()))
                raise ConfigError(f"{path}: {where} makes a circle of files: {circle}; take one of these {BASE} out")
            try:
                found = self.of(base, chain)
            except ConfigError as error:
                raise ConfigError(f"{path}: {where}: {error}") from error
            merged = _merged(merged, found, str(base), "")
        return _merged(merged, own, str(path), "")


def _bases(path: Path, value: Any) -> list[tuple[str, Path]]:
    """(JSON path, file) of each base that `path` names."""
    listed = value if isinstance(value, list) else [value]
    named = [(f"{BASE}[{number}]" if isinstance(value, list) else BASE, item) for number, item in enumerate(listed)]
    for where, item in named:
        if not isinstance(item, str) or not item:
            raise ConfigError(
                f"{path}: {where} is {item!r}; expected the path of a JSON file, relative to this one, or a list"
            )
    return [(where, path.parent / item) for where, item in named]


def _merged(base: dict[str, Any], own: dict[str, Any], file: str, where: str) -> dict[str, Any]:
    """`own` over `base`; `where` is their JSON path in `file`."""
    if DELETE in own and not where:
        raise ConfigError(f"{file}: {DELETE} at the top would replace all of the bases: leave {BASE} out instead")
    result = dict(base)
    for key, value in own.items():
        path = f"{where}.{key}" if where else key
        if not isinstance(value, dict):
            result[key] = value
            continue
        value = dict(value)
        delete = value.pop(DELETE, False)
        if type(delete) is not bool:
            raise ConfigError(f"{file}: {path}.{DELETE} is {delete!r}; expected true or false")
        if delete and key not in base:
            raise ConfigError(f"{file}: {path}.{DELETE} is true, but no base has {path}: take {DELETE} out")
        old = {} if delete or base.get(key) is None else base[key]
        if not isinstance(old, dict):
            raise ConfigError(f"{file}: {path} is an object, but {old!r} in the base: add {DELETE}: true to replace it")
        result[key] = _merged(old, value, file, path)
    return result
