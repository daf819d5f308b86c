"""Find an implementation by name: one implementation is one file, so that adding one edits nothing else.

The implementation `name` of a kind lives in the module `<package>.<name>` under a fixed attribute, for example
`find("mindspeed_mm.models.vision_encoder", "clip", "PART")`. Only the module that is asked for is imported.

Other packages add theirs by `register`, from a module that they name as an entry point of the group
"mindspeed_mm.plugins"; it is imported when a name is first looked up (docs/adding_a_family.md). Templates are JSON
files of the folder `mindspeed_mm/data/templates`, benchmarks modules of `evaluation/benchmarks`; further ones are
registered under these packages, too.
"""

import difflib
import functools
import importlib
import importlib.metadata
import pkgutil
from typing import Any

from mindspeed_mm.errors import ConfigError

PLUGINS = "mindspeed_mm.plugins"
"""Group of entry points whose modules register further implementations."""

_REGISTERED: dict[str, dict[str, Any]] = {}


def register(package: str, name: str, implementation: Any) -> None:
    """Add an implementation from outside: what a module `<package>.<name>` would hold under its fixed attribute.

    Raises ConfigError for a name that exists.
    """
    known = _REGISTERED.setdefault(package, {})
    if known.get(name, implementation) is not implementation or name in _own(package):
        raise ConfigError(f'"{name}" of {package} exists already; register it under another name')
    known[name] = implementation


def available(package: str) -> list[str]:
    """Names of the implementations in `package`, sorted. Modules whose name starts with an underscore are helpers."""
    _import_plugins()
    return sorted({*_own(package), *_REGISTERED.get(package, ())})


def find(package: str, name: str, attribute: str, *, what: str | None = None) -> Any:
    """Return `attribute` of the module `<package>.<name>`, or what was registered under that name.

    `what` names the kind in errors ("vision encoder"). Raises ConfigError for an unknown name, with the nearest one.
    """
    names = available(package)
    if name not in names:
        label = what or package.rsplit(".", 1)[-1].replace("_", " ")
        raise ConfigError(f'unknown {label} "{name}"; {nearest(name, names)}')
    if name in _REGISTERED.get(package, ()):
        return _REGISTERED[package][name]
    return getattr(importlib.import_module(f"{package}.{name}"), attribute)


def registered(package: str) -> dict[str, Any]:
    """What other packages have added to `package`, by name."""
    _import_plugins()
    return dict(_REGISTERED.get(package, {}))


def find_all(package: str, attribute: str) -> dict[str, Any]:
    """Every implementation in `package` by its name."""
    return {name: find(package, name, attribute) for name in available(package)}


def nearest(name: str, names: list[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, else all of them."""
    close = difflib.get_close_matches(name, names, n=1)
    return f'did you mean "{close[0]}"?' if close else f"known: {', '.join(names) or 'none'}"


@functools.cache
def _own(package: str) -> tuple[str, ...]:
    """Modules of the package's folder, which is read once: every look-up of a part asks for them."""
    paths = importlib.import_module(package).__path__
    return tuple(module.name for module in pkgutil.iter_modules(paths) if not module.name.startswith("_"))


@functools.cache
def _import_plugins() -> None:
    for entry in importlib.metadata.entry_points(group=PLUGINS):
        importlib.import_module(entry.value)
