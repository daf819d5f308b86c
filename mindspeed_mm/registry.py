"""Find an implementation by name: one implementation is one file, so that adding one edits nothing else.

The implementation `name` of a family lives in the module `<package>.<name>` under a fixed attribute, for example
`find("mindspeed_mm.models.vision_encoder", "clip", "PART")`. Only the module that is asked for is imported.
"""

import difflib
import importlib
import pkgutil
from typing import Any

from mindspeed_mm.errors import ConfigError


def available(package: str) -> list[str]:
    """Names of the implementations in `package`, sorted. Modules whose name starts with an underscore are helpers."""
    paths = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(paths) if not module.name.startswith("_"))


def find(package: str, name: str, attribute: str, *, what: str | None = None) -> Any:
    """Return `attribute` of the module `<package>.<name>`.

    `what` names the family in errors ("vision encoder"). Raises ConfigError for an unknown name, with the nearest one.
    """
    names = available(package)
    if name not in names:
        label = what or package.rsplit(".", 1)[-1].replace("_", " ")
        close = difflib.get_close_matches(name, names, n=1)
        hint = f'did you mean "{close[0]}"?' if close else f"known: {', '.join(names) or 'none'}"
        raise ConfigError(f'unknown {label} "{name}"; {hint}')
    return getattr(importlib.import_module(f"{package}.{name}"), attribute)
