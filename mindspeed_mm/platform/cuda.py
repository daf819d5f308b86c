"""NVIDIA GPUs with NCCL."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from mindspeed_mm.platform.base import MemoryStats, Platform, local_rank

MIB = 2**20

# Dense bf16/fp16 tensor-core peak in FLOP/s, from NVIDIA's data sheets (without sparsity).
BF16_PEAK = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "V100": 125e12}


class CudaPlatform(Platform):
    """One GPU per process."""

    name = "cuda"
    backend = "nccl"

    def __init__(self) -> None:
        index = local_rank()
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"LOCAL_RANK is {index} but this host shows {torch.cuda.device_count()} GPU(s): "
                "start at most one process per GPU (NPUS_PER_NODE / --nproc_per_node)"
            )
        torch.cuda.set_device(index)

    @classmethod
    def is_available(cls) -> bool:
        return torch.cuda.is_available()

    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def prepare_megatron(self) -> None:
        """megatron.core is written for CUDA."""

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def memory(self) -> MemoryStats:
        total = torch.cuda.get_device_properties(self.device()).total_memory
        return MemoryStats(torch.cuda.memory_allocated() / MIB, torch.cuda.max_memory_allocated() / MIB, total / MIB)

    def device_rng_state(self) -> torch.Tensor:
        return torch.cuda.get_rng_state()

    def set_device_rng_state(self, state: torch.Tensor) -> None:
        torch.cuda.set_rng_state(state)

    def segment_attention(
        self, query, key, value, segments, *, scale, dropout, causal=True, window=None, soft_cap=None
    ):
        """See Platform. One call of torch's variable-length flash attention, which has half precision, windows, and
        neither dropout nor a soft cap."""
        from torch.nn.attention.varlen import varlen_attn  # torch 2.10 on

        if dropout or soft_cap is not None or query.dtype not in (torch.bfloat16, torch.float16):
            options = {"scale": scale, "dropout": dropout, "causal": causal, "window": window, "soft_cap": soft_cap}
            return super().segment_attention(query, key, value, segments, **options)
        return varlen_attn(
            query,
            key,
            value,
            segments.offsets,
            segments.offsets,
            segments.longest,
            segments.longest,
            scale=scale,
            # Keys before and behind a query's own that it sees; -1: all.
            window_size=(-1 if window is None else window - 1, 0) if causal else (-1, -1),
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """torch has a fused CUDA kernel, for a weight of the input's type."""
        if weight.dtype != x.dtype:
            return super().rms_norm(x, weight, eps)
        return F.rms_norm(x, weight.shape, weight, eps)

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        if dtype not in (torch.bfloat16, torch.float16):
            return None
        name = torch.cuda.get_device_name()
        return next((peak for key, peak in BF16_PEAK.items() if key in name), None)

    def keep_float32_whole(self) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def profiler(self) -> torch.profiler.profile:
        activities = torch.profiler.ProfilerActivity
        return torch.profiler.profile(activities=[activities.CPU, activities.CUDA])

    def memory_snapshot(self, path: Path) -> bool:
        """A pickle for https://pytorch.org/memory_viz."""
        torch.cuda.memory._dump_snapshot(str(path))
        return True


PLATFORM = CudaPlatform
