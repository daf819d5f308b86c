"""How far the device may be from the CPU, and whether it is farther."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Verdict = Literal["equal", "different", "failed", "skipped"]

FP32_TOLERANCES = {
    "operator": 1e-4,
    "random state": 0.0,
    "layer": 1e-4,
    "loss": 1e-4,
    "gradient": 1e-3,
    "trajectory": 1e-2,
    "optimizer": 1e-3,
    "save and resume": 1e-4,
    "generation": 1e-3,
    "collective": 0.0,
}
"""Largest relative error of float32 results, by kind of case."""

BF16_TOLERANCES = {
    "operator": 1e-2,
    "random state": 0.0,
    "layer": 2e-2,
    "loss": 2e-2,
    "gradient": 3e-2,
    "trajectory": 3e-2,
    "optimizer": 3e-2,
    "save and resume": 1e-3,
    "generation": 3e-2,
    "collective": 0.0,
}
"""The same for bfloat16, against float32 on the CPU; where the CPU's own bfloat16 is farther away, see MORE."""

MORE = 3.0
"""Bfloat16 may be this many times as far from float32 as the CPU's bfloat16 is."""


@dataclass
class Collected:
    """What one device gave: tensors by "dtype: kind: case", and the errors of cases that did not end."""

    values: dict[str, torch.Tensor] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ParityRow:
    """One comparison."""

    dtype: str
    kind: str
    case: str
    verdict: Verdict
    error: float | None = None
    """Norm of the difference over the norm of the CPU's float32 result; the norm itself where that result is zero."""
    tolerance: float | None = None
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """The fields by name; a value that JSON cannot hold is null."""
        row = asdict(self)
        row["error"] = None if self.error is None or not math.isfinite(self.error) else self.error
        return row


def compare(cpu: Collected, device: Collected) -> list[ParityRow]:
    """A row for every case of the CPU; the device must have given each of them."""
    rows = []
    for name, reference in cpu.values.items():
        dtype, kind, case = name.split(": ", 2)
        if name not in device.values:
            note = next((text for case_name, text in device.errors.items() if name.startswith(case_name)), "")
            note = note or _error_of(kind, dtype, device.errors)
            rows.append(ParityRow(dtype, kind, case, "failed", note=note or "the device gave no such result"))
            continue
        exact = cpu.values[f"fp32: {kind}: {case}"]
        tolerance = _tolerance(dtype, kind, relative_error(reference, exact))
        error = relative_error(device.values[name], exact)
        rows.append(ParityRow(dtype, kind, case, "equal" if error <= tolerance else "different", error, tolerance))
    for name, text in cpu.errors.items():
        dtype, _, case = name.partition(": ")
        rows.append(ParityRow(dtype, case.partition(": ")[0], case, "failed", note=f"on the CPU: {text}"))
    return rows


def _error_of(kind: str, dtype: str, errors: dict[str, str]) -> str:
    """Layers, losses and gradients come from one case, which is called after its first part."""
    whole = {"loss": "layer", "gradient": "layer"}.get(kind, kind)
    return errors.get(f"{dtype}: {whole}", "")


def relative_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """|found - reference| / |reference|, norms of all elements; infinite for another shape or values that are no
    numbers."""
    if found.shape != reference.shape or not found.isfinite().all():
        return math.inf
    difference, size = (found.double() - reference.double()).norm().item(), reference.double().norm().item()
    return difference / size if size else difference


def _tolerance(dtype: str, kind: str, own_error: float) -> float:
    if dtype == "fp32":
        return FP32_TOLERANCES[kind]
    return max(BF16_TOLERANCES[kind], MORE * own_error)


def is_equal(rows: Iterable[ParityRow]) -> bool:
    """Whether nothing differs and nothing failed."""
    return all(row.verdict in ("equal", "skipped") for row in rows)
