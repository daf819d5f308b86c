"""What the kernels of a platform keep for the backward pass, where platforms differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mindspeed_mm.platform import host_products


@dataclass(frozen=True)
class Kernels:
    """Counts that enter the formulas of activations.py."""

    keeps_gathered: bool
    """Whether trained linears keep their input as gathered under sequence parallelism, or gather it again."""
    foreach_optimizer: bool
    """Whether AdamW runs over all tensors at once, with a temporary of their size."""
    host: bool
    """Whether this is the CPU, whose trained attention may take float32 copies of its inputs (platform/cpu.py)."""
    dtype: torch.dtype
    """Of activations."""
    single_products: bool
    """Whether products copy their operands to float32, since the processor has no instructions for `dtype`."""

    def single_attention(self, length: float, channels: int) -> bool:
        """Whether trained attention over `length` keys with heads of `channels` takes float32 copies."""
        chosen = host_products.choose_attention(self.dtype, round(length), channels) if self.host else None
        return chosen == host_products.SINGLE


def kernels_of(device: str, dtype: torch.dtype) -> Kernels:
    """The kernels that the layers use on `device` (cuda, npu, cpu) for activations of `dtype`.

    CPU is measured, and is taken to be like the one that plans. CUDA and NPU were not run by us.
    """
    host = device == "cpu"
    return Kernels(
        keeps_gathered=host,
        foreach_optimizer=device == "cuda",
        host=host,
        dtype=dtype,
        single_products=host and dtype in host_products.HALVES and not host_products.has_half_products(dtype),
    )
