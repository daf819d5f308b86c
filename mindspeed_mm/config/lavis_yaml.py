"""YAML files of MiniGPT-4 and its relatives: read safely, defaults of model and data sets below, `--options` on top."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mindspeed_mm.config.load import config_bytes, nearest
from mindspeed_mm.errors import ConfigError

SECTIONS = ("model", "datasets", "run", "evaluation_datasets", "preprocess")
"""What a file holds at the top."""


class _EachKeyOnce(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, as LAVIS's own reader does, where YAML would keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See yaml."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice; keep one of them", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file, without any of YAML's objects.

    Raises:
        ConfigError: the file is missing, too large, no YAML, names a Python object, or holds something else.
    """
    try:
        values = yaml.load(config_bytes(path, "YAML"), _EachKeyOnce)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path} is not plain YAML: {' '.join(str(error).split())}. Correct the file there."
        ) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: found {values!r:.60}; expected sections such as model: and run: at the top.")
    unknown = [key for key in values if key not in SECTIONS]
    if unknown:
        raise ConfigError(f"{path}: {unknown[0]}: unknown section; expected one of {', '.join(SECTIONS)}.")
    for key, value in values.items():
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: {key}: found {value!r:.60}; expected keys and values below it.")
    return values


def parsed_options(texts: Iterable[str]) -> dict[str, Any]:
    """`--options a.b=v ...`, or `--options a.b v ...` as LAVIS takes it, too, as nested mappings; values are read as
    YAML.

    Raises:
        ConfigError: one has no =, an empty name or a broken value.
    """
    result: dict[str, Any] = {}
    texts = list(texts)
    if texts and "=" not in texts[0] and len(texts) % 2 == 0:
        texts = [f"{name}={value}" for name, value in zip(texts[::2], texts[1::2], strict=True)]
    for text in texts:
        name, equals, value = text.partition("=")
        parts = name.split(".")
        if not equals or not all(parts):
            raise ConfigError(f"--options: found {text!r}; expected NAME=VALUE such as run.init_lr=1e-4")
        if parts[0] not in SECTIONS:
            raise ConfigError(f"--options: found {text!r}; expected a name that begins with {', '.join(SECTIONS)}")
        try:
            read = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--options: {text!r}: the value is not plain YAML; put it in quotes") from error
        for part in reversed(parts):
            read = {part: read}
        result = merged(result, read)
    return result


def merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` over `low`, mapping by mapping; everything that is no mapping is replaced."""
    result = dict(low)
    for key, value in high.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


def repository_of(path: Path, folder: str) -> Path | None:
    """The nearest folder above a file that holds `folder`; None where there is none."""
    return next((parent for parent in path.resolve().parents if (parent / folder).is_dir()), None)


class Section:
    """Values of one part of a file. What was asked for counts as used; `refuse_rest` refuses the others by name."""

    def __init__(self, name: str, values: Any):
        if values is None:
            values = {}
        if not isinstance(values, Mapping):
            raise ConfigError(f"{name}: found {values!r:.60}; expected keys and values below it.")
        self.name, self._values = name, values
        self._asked: dict[str, None] = {}

    def take(self, key: str, default: Any = None) -> Any:
        """The value, or `default` where it is not given or null."""
        self._asked[key] = None
        found = self._values.get(key)
        return default if found is None else found

    def number(self, key: str, default: float | None = None) -> float:
        """A number. YAML reads 1e-4 as a text, OmegaConf as a number: so does this. Raises ConfigError for others."""
        found = self.take(key, default)
        try:
            if found is None or isinstance(found, bool):
                raise ValueError
            return float(found)
        except (TypeError, ValueError) as error:
            raise self.wrong(key, found, "a number") from error

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 0. Raises ConfigError for others."""
        found = self.number(key, default)
        if found < 0 or found != int(found):
            raise self.wrong(key, found, "a whole number")
        return int(found)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false. Raises ConfigError for others."""
        found = self.take(key, default)
        if not isinstance(found, bool):
            raise self.wrong(key, found, "true or false")
        return found

    def only(self, key: str, allowed: Sequence[Any], reason: str) -> Any:
        """The value, the first allowed one where none is given. Raises ConfigError for one that is not allowed."""
        found = self.take(key, allowed[0])
        if found not in allowed:
            raise self.wrong(key, found, f"{' or '.join(map(repr, allowed))} ({reason})")
        return found

    def section(self, key: str) -> Section:
        """What stands below a key."""
        return Section(f"{self.name}.{key}", self.take(key))

    def given(self) -> list[str]:
        """All keys."""
        return list(self._values)

    def wrong(self, key: str, found: Any, expected: str) -> ConfigError:
        """The error for a value, with the option that changes it."""
        shown = "nothing" if found is None else f"{found!r:.80}"
        return ConfigError(
            f"{self.name}.{key}: found {shown}, expected {expected}; change it in the file or give "
            f"--options {self.name}.{key}=VALUE"
        )

    def refuse_rest(self) -> None:
        """Raise ConfigError for keys that nothing has asked for: they would be ignored."""
        for key in self._values:
            if key not in self._asked:
                close = nearest(key, self._asked)
                hint = f'did you mean "{close}"?' if close else f"known keys: {', '.join(sorted(self._asked))}."
                raise ConfigError(f"{self.name}.{key}: has no meaning here; {hint} Take it out of the file.")
