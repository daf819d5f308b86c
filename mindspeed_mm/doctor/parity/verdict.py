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
    "rounding": 1e-4,
    "row scale": 1e-4,
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
    "rounding": 4e-3,
    "row scale": 6e-4,
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

BY_ITSELF = ("rounding", "row scale")
"""Kinds whose tolerance is what rounding allows, whatever the CPU does (rounding.py). Kernels that sum in float32 stay
below 3e-3 and 3.5e-4, those that do not come to 1.2e-2 (scores) or 8e-4 (sums) and more."""


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
    """Norm of the difference over the norm of the CPU's float32 result; the norm itself where that result is zero. Of
    the kind "row scale": see row_scale_error."""
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
            whole = name.replace(": row scale: ", ": rounding: ")  # which measure the same results
            note = next((text for case_name, text in device.errors.items() if whole.startswith(case_name)), "")
            note = note or _error_of(kind, dtype, device.errors)
            rows.append(ParityRow(dtype, kind, case, "failed", note=note or "the device gave no such result"))
            continue
        exact = cpu.values[f"fp32: {kind}: {case}"]
        measure = row_scale_error if kind == "row scale" else relative_error
        tolerance = _tolerance(dtype, kind, relative_error(reference, exact))
        error = measure(device.values[name], exact)
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


def row_scale_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """By how much rows [..., n] are too large or too small as a whole: root of the mean square over the rows of
    <found, reference> / <reference, reference> - 1; infinite as relative_error is."""
    if found.shape != reference.shape or not found.isfinite().all():
        return math.inf
    own, wanted = found.double(), reference.double()
    return ((own * wanted).sum(-1) / wanted.square().sum(-1) - 1).square().mean().sqrt().item()


def _tolerance(dtype: str, kind: str, own_error: float) -> float:
    if dtype == "fp32":
        return FP32_TOLERANCES[kind]
    if kind in BY_ITSELF:
        return BF16_TOLERANCES[kind]
    return max(BF16_TOLERANCES[kind], MORE * own_error)


def is_equal(rows: Iterable[ParityRow]) -> bool:
    """Whether nothing differs and nothing failed."""
    return all(row.verdict in ("equal", "skipped") for row in rows)
