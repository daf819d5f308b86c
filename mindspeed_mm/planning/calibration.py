"""A quick measurement of this machine's device: matrix products of the model's sizes, and copies."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from mindspeed_mm.models.spec import ModelSpec
from mindspeed_mm.planning.hardware import Hardware
from mindspeed_mm.platform import Platform
from mindspeed_mm.platform.host_linear import multiply

SECONDS = 1.0
"""Each measurement lasts about so long."""
TOKENS = 512
COPIED = 2**27
"""Elements that a copy moves: more than any cache holds."""


def calibrate(hardware: Hardware, platform: Platform, spec: ModelSpec) -> Hardware:
    """`hardware` with the rates of this process's device in place of its own."""
    text, device = spec.text_decoder, platform.device()
    dtype = torch.bfloat16 if platform.name != "cpu" else torch.float32
    rows = torch.randn(TOKENS, text.hidden_size, device=device, dtype=dtype)
    weight = torch.randn(text.ffn_hidden_size, text.hidden_size, device=device, dtype=dtype)
    product = _rate(lambda: multiply(rows, weight), platform) * 2.0 * TOKENS * text.hidden_size * text.ffn_hidden_size
    source = torch.zeros(COPIED, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copied = _rate(lambda: target.copy_(source), platform) * 2 * COPIED
    return replace(
        hardware,
        name=f"this machine's {platform.name}",
        device=platform.name,
        peak_flops=product,
        memory_bandwidth=copied,
        efficiency=1.0,
        calibrated=True,
        source=f"measured: {TOKENS} x {text.hidden_size} x {text.ffn_hidden_size} products in {dtype}, copies",
    )


def _rate(work: Callable[[], object], platform: Platform) -> float:
    """Calls a second."""
    work()  # the first call sets things up
    platform.synchronize()
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        work()
        platform.synchronize()
        calls += 1
    return calls / (time.perf_counter() - start)
