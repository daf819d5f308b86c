"""`mindspeed-mm doctor`: whether this host can run the suite, and whether its device computes what the CPU computes."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import ConfigError

HELP = (
    "look at versions, devices, memory, network and variables, and compare a device with the CPU; 1 if something is bad"
)
EXAMPLE = "mindspeed-mm doctor --parity --device npu --report parity.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("npu", "cuda", "cpu"), help="default: the first that this machine has")
    parser.add_argument("--parity", action="store_true", help="compare the device with the CPU, operator by operator")
    parser.add_argument("--report", metavar="JSON", help="write everything that was found, to send in")
    parser.add_argument("--bundle", metavar="ZIP", help="write a redacted report to send in")
    parser.add_argument("--log", action="append", default=[], metavar="FILE", help="also into the bundle; repeatable")


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Print the screen, compare, write report and bundle.

    Raises:
        ConfigError: something is bad; `result` holds what --json prints.
    """
    from rich.console import Console

    from mindspeed_mm.doctor import report as screens
    from mindspeed_mm.host.finding import worst

    if namespace.log and not namespace.bundle:
        raise ConfigError("--log goes into a bundle: give --bundle FILE.zip, too")
    console = Console(file=sys.stdout)
    findings = screens.examine(namespace.device)
    screens.show(findings, console)
    report = screens.as_json(findings)
    wrong = [str(finding) for finding in findings if finding.level == "bad"]
    if namespace.parity and worst(findings) != "bad":
        report["parity"], differing = _parity(namespace.device, findings, console)
        wrong += differing
    _write(namespace, report)
    if wrong:
        error = ConfigError("not ready:\n  " + "\n  ".join(wrong))
        error.result = report
        raise error
    return report


def _parity(device: str | None, findings: list, console: Any) -> tuple[dict[str, Any], list[str]]:
    """(what --json prints, what differs)."""
    from mindspeed_mm.doctor.parity import run as comparison
    from mindspeed_mm.doctor.parity.verdict import is_equal
    from mindspeed_mm.doctor.software import cards_of

    device, count = cards_of(findings, device)
    rows = comparison.parity(device, count, console)
    comparison.show(rows, console)
    differing = [f"{row.dtype} {row.kind}: {row.case}: {row.verdict}" for row in rows if not is_equal([row])]
    return comparison.as_json(rows, device), differing


def _write(namespace: argparse.Namespace, report: dict[str, Any]) -> None:
    from mindspeed_mm.doctor.bundle import write_bundle, write_report

    if namespace.report:
        write_report(Path(namespace.report), report)
        sys.stdout.write(f"written: {namespace.report}\n")
    if namespace.bundle:
        members = write_bundle(Path(namespace.bundle), report, os.environ, [Path(log) for log in namespace.log])
        sys.stdout.write(f"written: {namespace.bundle} ({', '.join(members)})\n")
