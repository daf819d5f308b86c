"""Plain CPU with gloo: the same code path as on accelerators."""

from __future__ import annotations

import psutil
import torch

from mindspeed_mm.platform import host_memory, host_products
from mindspeed_mm.platform.base import MemoryStats, Platform
from mindspeed_mm.platform.host_megatron import install

MIB = 2**20


class CpuPlatform(Platform):
    """CPU device; megatron.core's CUDA calls are redirected when its modules are imported."""

    name = "cpu"
    backend = "gloo"

    def __init__(self) -> None:
        self._peak = 0.0

    @classmethod
    def is_available(cls) -> bool:
        return True

    def device(self) -> torch.device:
        return torch.device("cpu")

    def prepare_megatron(self) -> None:
        install()

    def settle(self) -> None:
        """Kernels of matrix products and of attention, see host_products."""
        host_products.settle()

    def keep_memory(self) -> None:
        """See host_memory."""
        host_memory.keep_freed()

    def choices(self) -> str:
        return host_products.describe()

    def attention(self, query, key, value, **options):
        """See Platform. Trained attention in half precision takes the kernel that host_products chose; the forward
        pass alone gains nothing by float32."""
        dtype = query.dtype
        trained = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        if trained and host_products.choose_attention(dtype, key.shape[2], key.shape[3]) == host_products.SINGLE:
            query, key, value = query.float(), key.float(), value.float()
        output = super().attention(query, key, value, **options)
        return output.to(dtype)

    def synchronize(self) -> None:
        """CPU work is done when the call returns."""

    def memory(self) -> MemoryStats:
        """Resident memory of this process."""
        allocated = psutil.Process().memory_info().rss / MIB
        self._peak = max(self._peak, allocated)
        return MemoryStats(allocated, self._peak, psutil.virtual_memory().total / MIB)

    @property
    def inference_tokens(self) -> int:
        """Fewer than on accelerators: a layer's activations should stay in the processor's caches."""
        return 2048

    def device_rng_state(self) -> None:
        return None

    def set_device_rng_state(self, state: torch.Tensor) -> None:
        raise ValueError("the CPU has no device generator besides torch's own: nothing to restore")


PLATFORM = CpuPlatform
