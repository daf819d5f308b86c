"""Platform interface and choice of device.

Legend: B batch, H heads, G key/value heads (query groups), S query length, K key length, D head size.
"""

from __future__ import annotations

import abc
import importlib
import os
import random
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.host import versions
from mindspeed_mm.platform import fused
from mindspeed_mm.platform.capped import CappedAttention, band
from mindspeed_mm.platform.segments import BranchedSegments, Segments

PLATFORM_ORDER = ("npu", "cuda", "cpu")
"""Order of choice when no device is named: the accelerators first, then the CPU that is always there."""

LEAST_BLOCK = 128
"""Queries of a block under a sliding window, at least: a narrower window is not worth more calls of the kernel."""

_current: Platform | None = None


@dataclass(frozen=True)
class MemoryStats:
    """Device memory in MiB. `total` is the device's size."""

    allocated: float
    peak: float
    total: float


class Platform(abc.ABC):
    """What the suite asks of an accelerator. One instance per process, chosen by `get_platform`."""

    name: str
    backend: str
    """torch.distributed backend of this device."""
    adds_in_norm: bool = False
    """Whether `add_rms_norm` is one operator."""
    packs_prompts: bool = False
    """Whether generation puts prompts one behind the other (`continued_attention`), else rows are padded."""

    @classmethod
    @abc.abstractmethod
    def is_available(cls) -> bool:
        """True when this process can use the device. Prints nothing.

        Raises:
            ConfigError: the device's stack is installed, and wrong in a way that the message explains.
        """

    @abc.abstractmethod
    def device(self) -> torch.device:
        """The device of this process (LOCAL_RANK picks the card)."""

    @abc.abstractmethod
    def prepare_megatron(self) -> None:
        """Make megatron.core run on this device. Call before the first import of megatron.core; idempotent."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Wait until all work queued on the device is done."""

    @abc.abstractmethod
    def memory(self) -> MemoryStats:
        """Memory figures of this process on its device."""

    @abc.abstractmethod
    def device_rng_state(self) -> torch.Tensor | None:
        """State of the device's default generator, uint8 on the CPU; None where that is the CPU generator itself."""

    @abc.abstractmethod
    def set_device_rng_state(self, state: torch.Tensor) -> None:
        """Restore what `device_rng_state` returned."""

    def settle(self) -> None:
        """Agree with the other ranks on what each would else choose for itself. Collective; for a whole process group.

        Here nothing is chosen.
        """
        return None

    def keep_memory(self) -> None:
        """Keep for the next step what a training step gives back. Devices' allocators do so by themselves."""
        return None

    def choices(self) -> str:
        """What was chosen for this machine, in lines for the log; empty where nothing was."""
        return ""

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Dense matrix peak of the device in FLOP/s for `dtype`, or None where it is not known."""
        return None

    @property
    def inference_tokens(self) -> int:
        """Tokens that go through a layer together at most where only its result is wanted: enough for full speed."""
        return 8192

    def keep_float32_whole(self) -> None:
        """From now on float32 products are computed in float32, and in no shorter format inside. Here they are."""
        return None

    def profiler(self) -> torch.profiler.profile:
        """A profiler of host and device, as a context manager with `export_chrome_trace`."""
        return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def memory_snapshot(self, path: Path) -> bool:
        """Write what the allocator holds to `path`; False where this device's cannot tell."""
        return False

    def seed(self, seed: int) -> None:
        """Seed python, numpy and torch (all devices)."""
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        mask: torch.Tensor | None,
        causal: bool,
        scale: float,
        dropout: float,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> torch.Tensor:
        """Scaled dot-product attention.

        Args:
            query: [B, H, S, D]; key, value: [B, G, K, D] with H a multiple of G.
            mask: bool [B or 1, 1, S, K], True = may attend, or None. With a mask, `causal` must be False.
            causal: a query sees the keys up to its own position; S is K.
            scale: factor on the scores, usually D ** -0.5.
            dropout: probability of dropping an attention weight, 0.0 when not training.
            window: of the keys that a causal query sees, the last ones that count, its own among them; None: all. A
                mask holds the window already.
            soft_cap: bounds the scores, cap * tanh(score / cap); None: not at all. There is no dropout then.

        Returns:
            [B, H, S, D] in the dtype of `query`.
        """
        if soft_cap is not None:
            if dropout:
                raise ValueError("attention with a soft cap has no dropout: found attention_dropout, set it to 0")
            return CappedAttention.apply(query, key, value, mask, causal, scale, soft_cap, window)
        if causal and window is not None and query.shape[2] > window:
            return self._window_attention(query, key, value, window, scale=scale, dropout=dropout)
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scale, dropout_p=dropout, enable_gqa=grouped
        )

    def _window_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int,
        *,
        scale: float,
        dropout: float,
    ) -> torch.Tensor:
        """Causal attention to the last `window` keys, S = K: blocks of queries, each with the keys that it can see."""
        size = max(window, LEAST_BLOCK)
        # Split, not sliced: the gradient of a slice is a tensor of the whole length, once for each block.
        blocks = list(zip(*(x.split(size, dim=2) for x in (query, key, value)), strict=True))
        outputs = []
        for number, (own, *looked_at) in enumerate(blocks):
            first = number * size
            begin = max(0, first + 1 - window)
            if begin < first:
                looked_at = [
                    torch.cat((x[:, :, begin - first :], y), dim=2)
                    for x, y in zip(blocks[number - 1][1:], looked_at, strict=True)
                ]
            seen = band(range(first, first + own.shape[2]), range(begin, first + own.shape[2]), window, query.device)
            outputs.append(
                self.attention(own, *looked_at, mask=seen[None, None], causal=False, scale=scale, dropout=dropout)
            )
        return torch.cat(outputs, dim=2)

    def segment_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Segments,
        *,
        scale: float,
        dropout: float,
        causal: bool = True,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> torch.Tensor:
        """Attention inside each of the sequences of a row.

        Args:
            query: [T, H, D]; key, value: [T, G, D] with H a multiple of G; T is where the last segment ends.
            causal, window, soft_cap: as for `attention`.

        Returns:
            [T, H, D] in the dtype of `query`.
        """
        options = {"scale": scale, "dropout": dropout, "window": window, "soft_cap": soft_cap}
        # Windows of an encoder are many of one length and go together; samples of a row are few and differ.
        runs = [(length, 1) for length in segments.lengths] if causal else segments.runs
        # Split, not sliced: the gradient of a slice is a tensor of the whole row's size, once for each of them.
        pieces = zip(*(x.split([length * count for length, count in runs]) for x in (query, key, value)), strict=True)
        outputs = []
        for (_, count), piece in zip(runs, pieces, strict=True):
            rows = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in piece)
            output = self.attention(*rows, mask=None, causal=causal, **options)
            outputs.append(output.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def continued_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        queries: Segments,
        keys: Segments,
        *,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> torch.Tensor:
        """Causal attention inside each of the sequences of a row, for the last positions of each.

        Args:
            query: [T, H, D]; key, value: [K, G, D] with H a multiple of G; T and K are where the last segments end.
            queries, keys: as many segments, none with more queries than keys: its last query is that of its last key.
            window, soft_cap: as for `attention`.

        Returns:
            [T, H, D] in the dtype of `query`.
        """
        outputs = []
        options = {"scale": scale, "dropout": 0.0, "window": window, "soft_cap": soft_cap}
        for own, all_keys in zip(queries.slices, keys.slices, strict=True):
            new, whole = own.stop - own.start, all_keys.stop - all_keys.start
            seen = None
            if new < whole:
                seen = band(range(whole - new, whole), range(whole), window, query.device)[None, None]
            row = (x.transpose(0, 1)[None] for x in (query[own], key[all_keys], value[all_keys]))
            outputs.append(self.attention(*row, mask=seen, causal=seen is None, **options)[0].transpose(0, 1))
        return torch.cat(outputs)

    def branch_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: BranchedSegments,
        *,
        scale: float,
        dropout: float,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> torch.Tensor:
        """Causal attention inside sequences that part into branches; arguments and result as for `segment_attention`.

        A sequence's beginning and its first branch go together, as one causal sequence; each other branch looks back
        at the beginning's keys, which are computed once.
        """
        options = {"scale": scale, "dropout": dropout, "soft_cap": soft_cap}
        lengths = [length for shared, first, *others in segments.branches for length in (shared + first, *others)]
        pieces = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        outputs = []
        for shared, _, *others in segments.branches:
            whole = next(pieces)
            rows = (x.transpose(0, 1)[None] for x in whole)
            outputs.append(self.attention(*rows, mask=None, causal=True, window=window, **options))
            for length in others:
                own, *looked_at = next(pieces)
                seen = band(range(shared, shared + length), range(shared + length), window, query.device)
                keys, values = (
                    torch.cat((x[:shared], y)).transpose(0, 1)[None] for x, y in zip(whole[1:], looked_at, strict=True)
                )
                row = own.transpose(0, 1)[None]
                outputs.append(self.attention(row, keys, values, mask=seen[None, None], causal=False, **options))
        return torch.cat([output[0].transpose(0, 1) for output in outputs])

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension, [..., H] and [H] -> [..., H]."""
        return fused.FusedRMSNorm.apply(x, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + residual, its rms_norm), both [..., H]; called by layers where `adds_in_norm` says that it is one
        operator."""
        total = residual + x
        return total, self.rms_norm(total, weight, eps)

    def swiglu(self, x: torch.Tensor) -> torch.Tensor:
        """silu(first half) * second half of the last dimension, [..., 2F] -> [..., F]."""
        return fused.SwiGLU.apply(x)

    def geglu(self, x: torch.Tensor) -> torch.Tensor:
        """gelu(first half) * second half of the last dimension, gelu in its tanh form: [..., 2F] -> [..., F]."""
        return fused.GeGLU.apply(x)

    def rotate_qk(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, groups: int, head_size: int | None = None
    ) -> torch.Tensor:
        """Rotate queries and keys of a joint projection, [S, B, G (A + 2) D] -> the same shape.

        Args:
            qkv: [S, B, G (A + 2) D]: A query heads, the key head and the value head of each group.
            cos, sin: [S, B or 1, 1, 1, R / 2] in the dtype of `qkv`, for the first R channels of each head.
            groups: G.
            head_size: D, None where it is R; channels from R on stay as they are.
        """
        return fused.RotateQK.apply(qkv, cos, sin, groups, head_size)


def local_rank() -> int:
    """Index of this process on its host, as torchrun sets it; 0 outside torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def quiet_third_party() -> None:
    """Keep warnings that a user cannot act on off the terminal: absent optional kernels, deprecations in libraries."""
    for module in ("megatron", "torch", "transformers"):
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
    warnings.filterwarnings("ignore", message=".*(Transformer ?Engine|Apex|apex|nvidia-modelopt|einops).*")


def _platform_class(name: str) -> type[Platform]:
    module = importlib.import_module(f"mindspeed_mm.platform.{name}")
    return module.PLATFORM


def get_platform(name: str | None = None) -> Platform:
    """Choose the device of this process and prepare megatron.core for it.

    Args:
        name: "cpu", "cuda" or "npu" (an index such as "cuda:1" is refused: LOCAL_RANK picks the card), or None for the
            first available of npu, cuda, cpu.

    Raises:
        ConfigError: unknown or unavailable device, another one was chosen before in this process, a version of torch or
            megatron-core that is known not to work, or a stack of the device that cannot be used.
    """
    global _current
    if name is not None and name not in PLATFORM_ORDER:
        raise ConfigError(f"--device {name!r} is not known: expected one of {', '.join(PLATFORM_ORDER)}")
    if _current is not None:
        if name not in (None, _current.name):
            raise ConfigError(
                f"this process already runs on {_current.name!r}, {name!r} was asked for: start a new process for it"
            )
        return _current
    candidates = PLATFORM_ORDER if name is None else (name,)
    for candidate in candidates:
        cls = _platform_class(candidate)
        if cls.is_available():
            versions.check(candidate)
            quiet_third_party()
            _current = cls()
            try:
                _current.prepare_megatron()  # what it imports may ask for the current platform
            except BaseException:
                _current = None
                raise
            return _current
    raise ConfigError(
        f'device {name} was asked for (by --device or a "device" key), but this machine has no usable {name} device '
        f"(torch {torch.__version__}): install its stack or give --device cpu"
    )


def current_platform() -> Platform:
    """The platform that `get_platform` chose; chooses the default one when none was."""
    return _current if _current is not None else get_platform()
