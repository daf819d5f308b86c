"""Runs the processes of the comparison, and shows what they found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mindspeed_mm.doctor.parity.verdict import Collected, ParityRow, compare, is_equal
from mindspeed_mm.errors import TrainingError

WORKER = "mindspeed_mm.doctor.parity.worker"
SECONDS = 1800
RANKS = 2
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def parity(device: str, count: int, console: Console) -> list[ParityRow]:
    """Compare `device` with the CPU.

    Args:
        count: cards of this host; the collectives take two, on the CPU none.

    Raises:
        TrainingError: a process ended before it could write what it found.
    """
    from mindspeed_mm.doctor.parity.worker import read

    with tempfile.TemporaryDirectory() as folder, console.status(f"comparing {device} with the CPU (minutes)"):
        found = []
        for name, own in (("cpu", Path(folder) / "reference"), (device, Path(folder) / "device")):
            own.mkdir()
            _wait([_start(name, own)], name)
            found.append(read(own))
        rows = compare(*found)
        if device != "cpu" and count < RANKS:
            note = f"{count} device(s): two ranks need two"
            return [*rows, ParityRow("fp32", "collective", "all-reduce over 2 ranks", "skipped", note=note)]
        both = Path(folder) / "both"
        both.mkdir()
        _wait([_start(device, both, rank) for rank in range(RANKS)], f"two ranks of {device}")
        sums = read(both / "ranks")
    exact = Collected({name: torch.zeros_like(value) for name, value in sums.values.items()})
    return rows + compare(exact, sums)


def _start(device: str, folder: Path, rank: int | None = None) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    if rank is not None:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    command = [sys.executable, "-m", WORKER, device, str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _wait(processes: list[subprocess.Popen], who: str) -> None:
    """Until all have ended; an error of one ends the others."""
    try:
        for process in processes:
            _, said = process.communicate(timeout=SECONDS)
            if process.returncode:
                raise TrainingError(f"--parity: {who} ended with exit code {process.returncode}: {_last_words(said)}")
    except subprocess.TimeoutExpired:
        raise TrainingError(f"--parity: {who} did not end within {SECONDS} s") from None
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _last_words(said: str) -> str:
    """The last line that says something behind the prefixes that torch.distributed puts before each."""
    lines = (re.sub(r"^(\[rank\d+\]:\s*)+", "", line).strip() for line in reversed(said.splitlines()))
    return next(filter(None, lines), "nothing was said")


def show(rows: list[ParityRow], console: Console) -> None:
    """A line for each kind and data type with its worst case, then every case that is not equal."""
    table = Table("data type", "kind", "cases", "worst case", "error", "tolerance", "verdict", box=None, pad_edge=False)
    groups: dict[tuple[str, str], list[ParityRow]] = {}
    for row in rows:
        groups.setdefault((row.dtype, row.kind), []).append(row)
    for (dtype, kind), own in groups.items():
        worst = max(own, key=_badness)
        style = "green" if is_equal(own) else "bold red"
        figures = ("-", "-") if worst.error is None else (f"{worst.error:.1e}", f"{worst.tolerance:.1e}")
        bad = sum(not is_equal([row]) for row in own)
        verdict = f"{bad} different or failed" if bad else worst.verdict
        table.add_row(dtype, kind, str(len(own)), worst.case, *figures, f"[{style}]{verdict}[/]")
    console.print(table)
    for row in rows:
        if not is_equal([row]):
            figures = "" if row.error is None else f": error {row.error:.2e}, at most {row.tolerance:.2e}"
            console.print(f"{row.verdict}: {row.dtype} {row.kind}: {row.case}{figures} {row.note}", highlight=False)
    console.print("the device computes what the CPU computes" if is_equal(rows) else "the device differs from the CPU")


def _badness(row: ParityRow) -> float:
    """How far a row is towards its tolerance."""
    if row.error is None:
        return 0.0 if row.verdict == "skipped" else float("inf")
    return row.error / row.tolerance if row.tolerance else row.error


def as_json(rows: list[ParityRow], device: str) -> dict[str, Any]:
    """What is sent in: the verdict and every row."""
    return {
        "device": device,
        "verdict": "equal" if is_equal(rows) else "different",
        "rows": [row.as_json() for row in rows],
    }
