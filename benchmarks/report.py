"""What the benchmarks say of the machine, and how they write their results."""

from __future__ import annotations

import json
import os
import platform as host
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "megatron-core")


def machine() -> dict[str, Any]:
    """Where and with what a benchmark runs. The load average is that of now: ask before the work begins."""
    return {
        "machine": host.machine(),
        "cores": os.cpu_count(),
        "python": host.python_version(),
        "load_average": os.getloadavg(),
        **{name: version(name) for name in PACKAGES},
    }


def write(results: dict[str, Any], out: str | None) -> None:
    """JSON into a file, or to stdout where none is named."""
    text = json.dumps(results, indent=2) + "\n"
    if out:
        Path(out).write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
