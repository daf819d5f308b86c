"""What the kernels of a platform keep for the backward pass, where platforms differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Kernels:
    """Counts that enter the formulas of activations.py."""

    fused_rms_norm: bool
    """One kernel for RMSNorm, which keeps its input and statistics only."""
    rotary_tables: int
    """Tensors of the size of one head's rotation that each layer keeps: sine and cosine, for query and key."""
    gated_mlp: int
    """Tensors of one half of the gated MLP's inner width that stay: gate and up, silu(gate), up + 0."""
    foreach_optimizer: bool
    """Whether AdamW runs over all tensors at once, with a temporary of their size."""


def kernels_of(device: str) -> Kernels:
    """The kernels that the layers use on `device` (cuda, npu, cpu).

    CPU is measured. For cuda torch's fused RMSNorm is assumed where this torch has it; an NPU is planned like the CPU,
    with the larger of both figures: neither was run by us.
    """
    cuda = device == "cuda"
    return Kernels(
        fused_rms_norm=cuda and hasattr(torch.ops.aten, "_fused_rms_norm"),
        rotary_tables=4,
        gated_mlp=4,
        foreach_optimizer=device != "cpu",
    )
