"""What the kernels of a platform keep for the backward pass, where platforms differ."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kernels:
    """Counts that enter the formulas of activations.py."""

    keeps_gathered: bool
    """Whether trained linears keep their input as gathered under sequence parallelism, or gather it again."""
    foreach_optimizer: bool
    """Whether AdamW runs over all tensors at once, with a temporary of their size."""


def kernels_of(device: str) -> Kernels:
    """The kernels that the layers use on `device` (cuda, npu, cpu).

    CPU is measured; CUDA and NPU were not run by us.
    """
    return Kernels(keeps_gathered=device == "cpu", foreach_optimizer=device != "cpu")
