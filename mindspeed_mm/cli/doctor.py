"""`mindspeed-mm doctor`: whether this host can run the suite, and whether its device computes what the CPU computes."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import ConfigError

HELP = "look at versions, devices, memory, network and variables; exit code 1 if something is bad"
EXAMPLE = "mindspeed-mm doctor --bundle report.zip"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("npu", "cuda", "cpu"), help="default: the first that this machine has")
    parser.add_argument("--bundle", metavar="ZIP", help="write a redacted report to send in")
    parser.add_argument("--log", action="append", default=[], metavar="FILE", help="also into the bundle; repeatable")


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Print the screen, write the bundle.

    Raises:
        ConfigError: something is bad; `result` holds what --json prints.
    """
    from rich.console import Console

    from mindspeed_mm.doctor import report as screens
    from mindspeed_mm.doctor.bundle import write_bundle

    if namespace.log and not namespace.bundle:
        raise ConfigError("--log goes into a bundle: give --bundle FILE.zip, too")
    findings = screens.examine(namespace.device)
    screens.show(findings, Console(file=sys.stdout))
    report = screens.as_json(findings)
    if namespace.bundle:
        members = write_bundle(Path(namespace.bundle), report, os.environ, [Path(log) for log in namespace.log])
        sys.stdout.write(f"written: {namespace.bundle} ({', '.join(members)})\n")
    if report["verdict"] == "bad":
        wrong = [str(finding) for finding in findings if finding.level == "bad"]
        error = ConfigError("not ready:\n  " + "\n  ".join(wrong))
        error.result = report
        raise error
    return report
