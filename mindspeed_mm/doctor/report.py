"""The findings as a screen and as JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from mindspeed_mm.doctor import machine, software
from mindspeed_mm.host import variables, versions
from mindspeed_mm.host.finding import LEVELS, Finding, worst

STYLES = {"ok": "green", "warn": "yellow", "bad": "bold red"}


def examine(device: str | None = None, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Look at everything. Takes seconds, since devices are asked in a process of its own."""
    return [*software.look(device, environment), *machine.look(environment), *variables.look(environment)]


def show(findings: list[Finding], console: Console) -> None:
    """One screen: a table, the tested versions, and how many findings there are of each level."""
    table = Table(box=None, pad_edge=False)
    for name in ("", "what", "found", "what to change"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        level = f"[{STYLES[finding.level]}]{finding.level}[/]"
        table.add_row(level, finding.name, finding.found, finding.change)
    console.print(table)
    for title, sets in (("run together by us", versions.TESTED), ("paired by others", versions.PAIRED)):
        for known in sets:
            console.print(f"{title} ({known.device}): {known}: {known.source}", highlight=False)
    console.print(", ".join(f"{count} {level}" for level, count in counts(findings).items()), highlight=False)


def counts(findings: list[Finding]) -> dict[str, int]:
    """Number of findings of each level."""
    return {level: sum(finding.level == level for finding in findings) for level in LEVELS}


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """What --json prints."""
    return {
        "verdict": worst(findings),
        "counts": counts(findings),
        "findings": [finding.as_json() for finding in findings],
        "tested": [str(known) for known in versions.TESTED],
    }
