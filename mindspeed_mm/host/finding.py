"""One line of a report about a host."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["ok", "warn", "bad"]

LEVELS: tuple[Level, ...] = ("ok", "warn", "bad")
"""From harmless to fatal."""


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, and what to change where it is not right."""

    group: str
    name: str
    found: str
    level: Level = "ok"
    change: str = ""

    def as_json(self) -> dict[str, str]:
        """The fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.name} {self.found}: {self.change}" if self.change else f"{self.name} {self.found}"


def worst(findings: list[Finding]) -> Level:
    """The most serious level; "ok" for an empty list."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")
