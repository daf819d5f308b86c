"""`--adapter NAME=DIR` of a server."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mindspeed_mm.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,199}")


def named_adapters(given: Sequence[str] | None, model: str) -> tuple[str | None, dict[str, Path]]:
    """(the folder of an adapter that is always on, or None; the folders of others by their names).

    `model` is the name of the model without them. Raises ConfigError for both kinds at once, a name twice, or one that
    cannot be one.
    """
    always: list[str] = []
    named: dict[str, Path] = {}
    for text in given or ():
        name, equals, folder = text.partition("=")
        if not equals or "/" in name:
            always.append(text)
            continue
        if not NAME.fullmatch(name) or not folder:
            raise ConfigError(
                f"--adapter {text}: expected NAME=DIR with a name of letters, digits and . _ : - that requests can give"
            )
        if name in named or name == model:
            owner = "the model without adapters" if name == model else "another adapter"
            raise ConfigError(f"--adapter {text}: {owner} has the name {name} already; choose another one")
        named[name] = Path(folder)
    if len(always) > 1 or (always and named):
        raise ConfigError(
            f"--adapter {always[0]} has no name and is always on, which goes with no other adapter: give each of them "
            "a name, as in --adapter NAME=DIR"
        )
    return (always[0] if always else None), named
