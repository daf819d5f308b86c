"""Ascend NPUs with HCCL, through torch_npu's documented interface.

Sources: Ascend Extension for PyTorch documentation of `torch_npu.contrib.transfer_to_npu` (redirects torch.cuda and
the nccl backend to the NPU), `torch_npu.npu_fusion_attention` (flash attention forward and backward),
`torch_npu.npu_rms_norm` and `torch_npu.npu_swiglu`.
Not run by us: no NPU was at hand. Every torch_npu import stays inside this file's functions.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import torch

from mindspeed_mm.platform.base import MemoryStats, Platform, local_rank

MIB = 2**20

# npu_fusion_attention's sparse modes: 0 takes the mask as it is, 2 is causal aligned to the top left corner and takes
# a compressed upper-triangular mask of this size.
DENSE_MASK_MODE = 0
CAUSAL_MODE = 2
COMPRESSED_MASK_SIZE = 2048


class NpuPlatform(Platform):
    """One NPU per process. MindSpeed is used where it is installed and never needed."""

    name = "npu"
    backend = "hccl"

    def __init__(self) -> None:
        self._torch_npu = importlib.import_module("torch_npu")
        torch.npu.set_device(local_rank())
        self._causal_mask: torch.Tensor | None = None

    @classmethod
    def is_available(cls) -> bool:
        if importlib.util.find_spec("torch_npu") is None:
            return False
        importlib.import_module("torch_npu")
        return torch.npu.is_available()

    def device(self) -> torch.device:
        return torch.device("npu", local_rank())

    def prepare_megatron(self) -> None:
        """Redirect torch.cuda to the NPU; let MindSpeed adapt megatron.core where it is installed."""
        importlib.import_module("torch_npu.contrib.transfer_to_npu")
        if importlib.util.find_spec("mindspeed") is not None:
            importlib.import_module("mindspeed.megatron_adaptor")

    def synchronize(self) -> None:
        torch.npu.synchronize()

    def memory(self) -> MemoryStats:
        total = torch.npu.get_device_properties(local_rank()).total_memory
        return MemoryStats(torch.npu.memory_allocated() / MIB, torch.npu.max_memory_allocated() / MIB, total / MIB)

    def device_rng_state(self) -> torch.Tensor:
        return torch.npu.get_rng_state()

    def set_device_rng_state(self, state: torch.Tensor) -> None:
        torch.npu.set_rng_state(state)

    def attention(self, query, key, value, *, mask, causal, scale, dropout, window=None, soft_cap=None):
        """See Platform.attention. The operator's masks say True = hidden, the reverse of ours. It has no soft cap;
        windows go to it in blocks of queries, with a mask each."""
        if soft_cap is not None or (causal and window is not None and query.shape[2] > window):
            options = {"scale": scale, "dropout": dropout, "window": window, "soft_cap": soft_cap}
            return super().attention(query, key, value, mask=mask, causal=causal, **options)
        hidden = self._compressed_mask(query.device) if causal else None if mask is None else ~mask
        return self._torch_npu.npu_fusion_attention(
            query,
            key,
            value,
            head_num=query.shape[1],
            input_layout="BNSD",
            atten_mask=hidden,
            scale=scale,
            keep_prob=1.0 - dropout,
            sparse_mode=CAUSAL_MODE if causal else DENSE_MASK_MODE,
        )[0]

    def segment_attention(
        self, query, key, value, segments, *, scale, dropout, causal=True, window=None, soft_cap=None
    ):
        """See Platform. The operator's layout TND takes the ends of the sequences."""
        if soft_cap is not None or (window is not None and segments.longest > window):
            options = {"scale": scale, "dropout": dropout, "causal": causal, "window": window, "soft_cap": soft_cap}
            return super().segment_attention(query, key, value, segments, **options)
        return self._torch_npu.npu_fusion_attention(
            query,
            key,
            value,
            head_num=query.shape[1],
            input_layout="TND",
            atten_mask=self._compressed_mask(query.device) if causal else None,
            scale=scale,
            keep_prob=1.0 - dropout,
            sparse_mode=CAUSAL_MODE if causal else DENSE_MASK_MODE,
            actual_seq_qlen=segments.ends,
            actual_seq_kvlen=segments.ends,
        )[0]

    def _compressed_mask(self, device: torch.device) -> torch.Tensor:
        if self._causal_mask is None:
            ones = torch.ones(COMPRESSED_MASK_SIZE, COMPRESSED_MASK_SIZE, dtype=torch.bool, device=device)
            self._causal_mask = ones.triu(1)
        return self._causal_mask

    def rms_norm(self, x, weight, eps):
        """See Platform; torch_npu.npu_rms_norm, for a weight of the input's type."""
        if weight.dtype != x.dtype:
            return super().rms_norm(x, weight, eps)
        return self._torch_npu.npu_rms_norm(x, weight, epsilon=eps)[0]

    def swiglu(self, x):
        """See Platform; torch_npu.npu_swiglu."""
        return self._torch_npu.npu_swiglu(x, dim=-1)

    def profiler(self):
        profiler = self._torch_npu.profiler
        return profiler.profile(activities=[profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU])

    def memory_snapshot(self, path: Path) -> bool:
        """torch_npu mirrors torch.cuda.memory from 2.1 on."""
        torch.npu.memory._dump_snapshot(str(path))
        return True


PLATFORM = NpuPlatform
