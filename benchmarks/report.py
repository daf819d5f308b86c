"""What the benchmarks say of the machine, and how they write their results."""

from __future__ import annotations

import json
import os
import platform as host
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PROCESSOR_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
PACKAGES = ("torch", "transformers", "megatron-core")


def machine() -> dict[str, Any]:
    """Where and with what a benchmark runs. The load average is that of now: ask before the work begins."""
    return {
        "machine": host.machine(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        **{name: os.environ[name] for name in PROCESSOR_LIMITS if name in os.environ},
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


def best_product_rate(dtype: torch.dtype, rows: int, width: int, outer: int) -> float:
    """The most FLOP/s that a kernel of this machine reaches at a linear layer's three products, both ways together."""
    from mindspeed_mm.platform import host_products

    seconds = 0.0
    for form in host_products.FORMS:
        x, weight = host_products.operands(form, rows, width, outer, dtype)
        calls = {name: lambda k=name: host_products.run(k, x, weight) for name in host_products.kernels(dtype)}  # noqa: B023
        seconds += min(host_products.fastest(calls).values())
    return len(host_products.FORMS) * 2.0 * rows * width * outer / seconds
