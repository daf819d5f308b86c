"""Ascend NPUs with HCCL, through torch_npu's documented interface.

Sources: Ascend Extension for PyTorch documentation of `torch_npu.contrib.transfer_to_npu` (redirects torch.cuda and
the nccl backend to the NPU) and of the operators that are called below.
Not run by us: no NPU was at hand. tests/npu run it on a stand-in for torch_npu, which holds each call against the
schema of the operator. Every torch_npu import stays inside this file's functions.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.host import cards, variables, versions
from mindspeed_mm.platform.base import MemoryStats, Platform, local_rank
from mindspeed_mm.platform.segments import Segments

logger = logging.getLogger(__name__)

MIB = 2**20
HALVES = (torch.bfloat16, torch.float16)

# npu_fusion_attention's sparse modes: 0 takes the mask as it is, 2 is causal aligned to the top left corner, 3 to the
# bottom right one, 4 a band of pre_tockens keys before the query's own and next_tockens behind it, aligned as 3 is. The
# last three take a compressed upper-triangular mask of COMPRESSED_MASK_SIZE.
DENSE_MASK_MODE = 0
CAUSAL_MODE = 2
CONTINUED_MODE = 3
BAND_MODE = 4
COMPRESSED_MASK_SIZE = 2048

# Limits that the operators' documentation states.
MOST_SEQUENCES = 1024
MOST_POSITIONS = 2**20
"""Of npu_fusion_attention in layout TND, all sequences together."""

DECODED_QUERIES = 32
DECODED_CHANNELS = 16
"""npu_fused_infer_attention_score is given at most so many queries; channels of a head are a multiple of the other."""

ROTARY_CHANNELS = 896
ROTARY_HEADS = 1000
"""Channels of a head, and rows or heads, stay below these in npu_rotary_mul."""


class NpuPlatform(Platform):
    """One NPU per process. MindSpeed is used where it is installed and never needed."""

    name = "npu"
    backend = "hccl"
    adds_in_norm = True
    packs_prompts = True

    def __init__(self) -> None:
        variables.check(os.environ)
        self._torch_npu = importlib.import_module("torch_npu")
        count = torch.npu.device_count()
        if local_rank() >= count:
            raise ConfigError(
                f"LOCAL_RANK is {local_rank()} but this host shows {count} NPU(s): start at most one process per NPU "
                "(NPUS_PER_NODE / --nproc_per_node), and look at ASCEND_RT_VISIBLE_DEVICES"
            )
        torch.npu.set_device(local_rank())
        _check_card(torch.npu.get_device_name(local_rank()))
        self._causal_mask: torch.Tensor | None = None

    @classmethod
    def is_available(cls) -> bool:
        if importlib.util.find_spec("torch_npu") is None:
            return False
        found = versions.torch_npu_finding()
        if found is not None and found.level == "bad":
            raise ConfigError(f"{found}. --device cpu does without it")
        try:
            importlib.import_module("torch_npu")
        except (ImportError, OSError, RuntimeError) as error:  # shared libraries of CANN that are not found
            raise ConfigError(
                f"torch_npu is installed but cannot be imported ({error}): it needs CANN, so first "
                "`source /usr/local/Ascend/ascend-toolkit/set_env.sh`; --device cpu does without it"
            ) from error
        return torch.npu.is_available()

    def device(self) -> torch.device:
        return torch.device("npu", local_rank())

    def prepare_megatron(self) -> None:
        """Redirect torch.cuda to the NPU; adapt megatron.core, by MindSpeed where it is installed."""
        importlib.import_module("torch_npu.contrib.transfer_to_npu")
        if importlib.util.find_spec("mindspeed") is not None:
            importlib.import_module("mindspeed.megatron_adaptor")
        else:
            importlib.import_module("mindspeed_mm.platform.npu_megatron").install()

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
        """See Platform.attention. The operator's masks say True = hidden, the reverse of ours. It has no soft cap.
        New tokens behind a cache go to the operator for that, in half precision, which it wants."""
        if soft_cap is not None:
            options = {"scale": scale, "dropout": dropout, "window": window, "soft_cap": soft_cap}
            return super().attention(query, key, value, mask=mask, causal=causal, **options)
        # A mask that is the same for all queries is refused by the operators.
        hidden = None if mask is None else ~mask.expand(query.shape[0], 1, query.shape[2], key.shape[2])
        if self._decodes(query, causal):
            return self._decode(query, key, value, hidden, scale)
        options = self._causal(query, window) if causal else {"atten_mask": hidden}
        return self._fusion_attention(query, key, value, "BNSD", query.shape[1], scale, dropout, **options)

    def segment_attention(
        self, query, key, value, segments, *, scale, dropout, causal=True, window=None, soft_cap=None
    ):
        """See Platform. The operator's layout TND takes the ends of the sequences."""
        if soft_cap is not None or not _has_ends(segments):
            options = {"scale": scale, "dropout": dropout, "causal": causal, "window": window, "soft_cap": soft_cap}
            return super().segment_attention(query, key, value, segments, **options)
        options = self._causal(query, window) if causal else {}
        options |= {"actual_seq_qlen": segments.ends, "actual_seq_kvlen": segments.ends}
        return self._fusion_attention(query, key, value, "TND", query.shape[1], scale, dropout, **options)

    def continued_attention(self, query, key, value, queries, keys, *, scale, window=None, soft_cap=None):
        """See Platform. Layout TND with other ends for queries than for keys, and a mode that is aligned to the last of
        both."""
        if soft_cap is not None or not _has_ends(keys):
            options = {"scale": scale, "window": window, "soft_cap": soft_cap}
            return super().continued_attention(query, key, value, queries, keys, **options)
        options = self._causal(query, window, CONTINUED_MODE)
        options |= {"actual_seq_qlen": queries.ends, "actual_seq_kvlen": keys.ends}
        return self._fusion_attention(query, key, value, "TND", query.shape[1], scale, 0.0, **options)

    def _fusion_attention(self, query, key, value, layout, heads, scale, dropout, **options) -> torch.Tensor:
        return self._torch_npu.npu_fusion_attention(
            query, key, value, head_num=heads, input_layout=layout, scale=scale, keep_prob=1.0 - dropout, **options
        )[0]

    def _causal(self, query: torch.Tensor, window: int | None, mode: int = CAUSAL_MODE) -> dict:
        """Options of a causal mask, of `mode` where there is no window."""
        mask = {"atten_mask": self._compressed_mask(query.device)}
        if window is None:
            return mask | {"sparse_mode": mode}
        return mask | {"sparse_mode": BAND_MODE, "pre_tockens": window - 1, "next_tockens": 0}

    @staticmethod
    def _decodes(query: torch.Tensor, causal: bool) -> bool:
        """Whether this is a step of generation: one token, whose heads may stand as a sequence (single_token.py)."""
        few = query.shape[2] == 1 or (not causal and query.shape[2] <= DECODED_QUERIES)
        fits = query.dtype in HALVES and query.shape[3] % DECODED_CHANNELS == 0
        return few and fits and not torch.is_grad_enabled()

    def _decode(self, query, key, value, hidden, scale) -> torch.Tensor:
        """[B, H, S, D] for few queries, without a backward pass. `hidden`: [B, 1, S, K], True = hidden, or None."""
        return self._torch_npu.npu_fused_infer_attention_score(
            query,
            key,
            value,
            atten_mask=hidden,
            num_heads=query.shape[1],
            num_key_value_heads=key.shape[1],
            input_layout="BNSD",
            scale=scale,
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

    def add_rms_norm(self, x, residual, weight, eps):
        """See Platform; torch_npu.npu_add_rms_norm, whose backward pass is npu_rms_norm's and the addition's."""
        if not x.dtype == residual.dtype == weight.dtype:
            return super().add_rms_norm(x, residual, weight, eps)
        return _AddRMSNormByOperator.apply(self._torch_npu, x, residual, weight, eps)

    def swiglu(self, x):
        """See Platform; torch_npu.npu_swiglu."""
        return self._torch_npu.npu_swiglu(x, dim=-1)

    def rotate_qk(self, qkv, cos, sin, groups, head_size=None):
        """See Platform; torch_npu.npu_rotary_mul, for sizes that it takes."""
        rotated = 2 * cos.shape[-1]
        size = head_size or rotated
        rows, heads = qkv.shape[1], qkv.shape[2] // size
        if rotated >= ROTARY_CHANNELS or max(rows, heads) >= ROTARY_HEADS:
            return super().rotate_qk(qkv, cos, sin, groups, head_size)
        angles = (torch.cat((half, half), dim=-1).squeeze(3) for half in (cos, sin))
        return _RotateByOperator.apply(self._torch_npu.npu_rotary_mul, qkv, *angles, groups, size)

    def keep_float32_whole(self) -> None:
        torch.npu.matmul.allow_hf32 = torch.npu.conv.allow_hf32 = False

    def profiler(self):
        profiler = self._torch_npu.profiler
        return profiler.profile(activities=[profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU])

    def memory_snapshot(self, path: Path) -> bool:
        """torch_npu mirrors torch.cuda.memory from 2.1 on."""
        torch.npu.memory._dump_snapshot(str(path))
        return True


class _AddRMSNormByOperator(torch.autograd.Function):
    """Platform.add_rms_norm; keeps the sum and a value for each position, as npu_rms_norm does of its input."""

    @staticmethod
    def forward(ctx, operators, x, residual, weight, eps):
        """x, residual [..., H], weight [H] -> the sum and its norm."""
        normed, scale, total = operators.npu_add_rms_norm(x, residual, weight, epsilon=eps)
        ctx.save_for_backward(total, weight, scale)
        ctx.operators = operators
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, grad_normed):
        """What flows into the sum flows into both of its terms."""
        total, weight, scale = ctx.saved_tensors
        grad, grad_weight = ctx.operators.npu_rms_norm_backward(grad_normed.contiguous(), total, weight, scale)
        grad = grad + grad_total
        return None, grad, grad, grad_weight.to(weight.dtype), None


class _RotateByOperator(torch.autograd.Function):
    """Platform.rotate_qk by npu_rotary_mul, whose own backward pass keeps queries and keys; this keeps the angles."""

    @staticmethod
    def forward(ctx, operator, qkv, cos, sin, groups, size):
        """qkv [S, B, G (A + 2) D]; cos, sin [S, B or 1, 1, R], for the first R channels of each head."""
        ctx.save_for_backward(cos, sin)
        ctx.options = (operator, groups, size)
        return _rotate(operator, qkv, cos, sin, groups, size)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """The rotation backwards."""
        cos, sin = ctx.saved_tensors
        operator, groups, size = ctx.options
        return None, _rotate(operator, grad, cos, -sin, groups, size), None, None, None, None


def _rotate(operator, qkv, cos, sin, groups: int, size: int) -> torch.Tensor:
    heads = qkv.reshape(*qkv.shape[:2], groups, -1, size)
    rotated = cos.shape[-1]
    turned = operator(heads[..., :-1, :rotated].flatten(2, 3), cos, sin).unflatten(2, (groups, -1))
    if rotated < size:
        turned = torch.cat((turned, heads[..., :-1, rotated:]), dim=-1)
    return torch.cat((turned, heads[..., -1:, :]), dim=3).view(qkv.shape)


def _has_ends(segments: Segments) -> bool:
    """Whether npu_fusion_attention takes the ends of these sequences."""
    return len(segments.ends) <= MOST_SEQUENCES and segments.ends[-1] <= MOST_POSITIONS


def _check_card(name: str) -> None:
    """Raises ConfigError for a card that lacks the operators; warns of one that nobody knows."""
    level, change = cards.judge(name)
    if level == "bad":
        raise ConfigError(f"NPU {name}: {change}")
    if level == "warn":
        logger.warning("NPU %s: %s", name, change)


PLATFORM = NpuPlatform
