"""Each operation of the Platform interface, with gradients, and what it restores of a random state.

Legend: B batch, H query heads, G key/value heads, S sequence, D channels of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from mindspeed_mm.platform import Platform
from mindspeed_mm.platform.segments import BranchedSegments, Segments

Values = dict[str, torch.Tensor]
Case = Callable[..., torch.Tensor]

B, H, G, S, D = 2, 4, 2, 40, 16
CHANNELS = 64
LENGTHS = (7, 1, 20, 12)
NEW = (3, 1, 20, 7)
"""Of the sequences of LENGTHS, the last positions that ask: one begins here, the others go on."""

BRANCHES = ((5, 8, 9), (0, 7), (3, 4, 4))
"""Of each sequence: what its branches share, then the branches; S in all."""

ROWS, WIDE = 300, 128
"""Positions and channels beyond a kernel's first block, which S and D stay within."""

WIDE_LENGTHS = (131, 1, 168)

WINDOW = 9
SCALE = D**-0.5
CAP = 5.0


def cases(platform: Platform) -> Iterator[tuple[str, Case, tuple[tuple[int, ...], ...]]]:
    """(name, function, shapes of its inputs) of every operation."""
    for heads, name in ((H, "one key/value head each"), (G, "grouped heads")):
        shapes = ((B, H, S, D), (B, heads, S, D), (B, heads, S, D))
        for kind, options in _attention_kinds(platform.device()).items():
            yield f"attention, {kind}, {name}", _attention(platform, options), shapes
        shapes = ((S, H, D), (S, heads, D), (S, heads, D))
        for kind, options in _segment_kinds().items():
            yield f"attention in sequences of a row, {kind}, {name}", _segments(platform, options), shapes
        for kind, options in {"causal": {}, "window": {"window": WINDOW}}.items():
            yield f"attention in branches, {kind}, {name}", _branches(platform, options), shapes
        shapes = ((sum(NEW), H, D), (S, heads, D), (S, heads, D))
        for kind, options in _continued_kinds().items():
            yield f"attention of continued sequences, {kind}, {name}", _continued(platform, options), shapes
    options = {"causal": True, "scale": WIDE**-0.5}
    shapes = ((1, H, ROWS, WIDE), (1, G, ROWS, WIDE), (1, G, ROWS, WIDE))
    yield "attention, causal, many positions and channels", _attention(platform, options), shapes
    shapes = ((ROWS, H, WIDE), (ROWS, G, WIDE), (ROWS, G, WIDE))
    yield (
        "attention in sequences of a row, many positions and channels",
        _segments(platform, options, WIDE_LENGTHS),
        shapes,
    )
    held = {"mask": _held(platform.device())}
    yield "attention of one new token", _attention(platform, held), ((B, H, 1, D), (B, G, S, D), (B, G, S, D))
    yield "rms_norm", lambda x, weight: platform.rms_norm(x, weight, 1e-5), ((S, B, CHANNELS), (CHANNELS,))
    yield "add_rms_norm", _added(platform), ((S, B, CHANNELS), (S, B, CHANNELS), (CHANNELS,))
    yield "swiglu", platform.swiglu, ((S, B, 2 * CHANNELS),)
    yield "geglu", platform.geglu, ((S, B, 2 * CHANNELS),)
    yield "rotate_qk", _rotation(platform, D), ((S, B, G * (H // G + 2) * D),)
    yield "rotate_qk, half of the channels", _rotation(platform, D // 2), ((S, B, G * (H // G + 2) * D),)
    yield "linear", F.linear, ((S, B, CHANNELS), (2 * CHANNELS, CHANNELS), (2 * CHANNELS,))
    yield "layer_norm", lambda x, w, b: F.layer_norm(x, (CHANNELS,), w, b), ((S, B, CHANNELS), (CHANNELS,), (CHANNELS,))
    yield "gelu", F.gelu, ((S, B, CHANNELS),)
    yield "convolution of patches", lambda x, w: F.conv2d(x, w, stride=7), ((B, 3, 28, 28), (CHANNELS, 3, 7, 7))
    yield "cross_entropy", _cross_entropy, ((S, CHANNELS),)
    yield "embedding", _embedding, ((CHANNELS, CHANNELS),)


def _attention_kinds(device: torch.device) -> dict[str, dict]:
    mask = torch.ones(B, 1, S, S, dtype=torch.bool).tril()
    mask[1, :, :, :5] = False
    mask |= torch.eye(S, dtype=torch.bool)
    return {
        "all": {},
        "causal": {"causal": True},
        "masked": {"mask": mask.to(device)},
        "window": {"causal": True, "window": WINDOW},
        "soft cap": {"causal": True, "soft_cap": CAP},
    }


def _segment_kinds() -> dict[str, dict]:
    return {"causal": {}, "all": {"causal": False}, "window": {"window": WINDOW}, "soft cap": {"soft_cap": CAP}}


def _continued_kinds() -> dict[str, dict]:
    return {"causal": {}, "window": {"window": WINDOW}, "soft cap": {"soft_cap": CAP}}


def _held(device: torch.device) -> torch.Tensor:
    """Of the keys in a cache, those that each row holds."""
    return (torch.arange(S) < torch.tensor([S, S - 11])[:, None])[:, None, None].to(device)


def _attention(platform: Platform, options: dict) -> Case:
    common = {"mask": None, "causal": False, "scale": SCALE, "dropout": 0.0} | options
    return lambda query, key, value: platform.attention(query, key, value, **common)


def _segments(platform: Platform, options: dict, lengths: tuple[int, ...] = LENGTHS) -> Case:
    segments = Segments.of_lengths(lengths, platform.device())
    common = {"scale": SCALE, "dropout": 0.0} | options
    return lambda query, key, value: platform.segment_attention(query, key, value, segments, **common)


def _continued(platform: Platform, options: dict) -> Case:
    new, whole = (Segments.of_lengths(lengths, platform.device()) for lengths in (NEW, LENGTHS))
    return lambda query, key, value: platform.continued_attention(query, key, value, new, whole, scale=SCALE, **options)


def _branches(platform: Platform, options: dict) -> Case:
    segments = BranchedSegments.of_branches(BRANCHES, platform.device())
    common = {"scale": SCALE, "dropout": 0.0} | options
    return lambda query, key, value: platform.branch_attention(query, key, value, segments, **common)


def _rotation(platform: Platform, channels: int) -> Case:
    frequencies = 10000.0 ** (-torch.arange(0, channels, 2) / channels)
    angles = (torch.arange(S)[:, None] * frequencies).view(S, 1, 1, 1, channels // 2)
    cos, sin = (half.to(platform.device()) for half in (angles.cos(), angles.sin()))
    return lambda qkv: platform.rotate_qk(qkv, cos.to(qkv.dtype), sin.to(qkv.dtype), G, D)


def _added(platform: Platform) -> Case:
    """Both results in one, so that gradients flow into the sum and into its norm."""

    def both(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.cat(platform.add_rms_norm(x, residual, weight, 1e-5), dim=-1)

    return both


def _cross_entropy(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), torch.arange(S, device=logits.device), reduction="none")


def _embedding(weight: torch.Tensor) -> torch.Tensor:
    return F.embedding(torch.arange(S, device=weight.device) * 7 % CHANNELS, weight)


def drawn(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Normal values that bfloat16 can hold, float32 on the CPU, the same on every machine."""
    return torch.randn(shape, generator=generator).bfloat16().float()


def compute(platform: Platform, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Values]]]:
    """(name, function) of every case; the function gives its result and gradients, float32 on the CPU, by name."""
    for number, (name, function, shapes) in enumerate(cases(platform)):
        yield f"operator: {name}", functools.partial(_compute, platform, dtype, number, name, function, shapes)


def _compute(
    platform: Platform, dtype: torch.dtype, number: int, name: str, function: Case, shapes: tuple[tuple[int, ...], ...]
) -> Values:
    generator = torch.Generator().manual_seed(number)
    inputs = [drawn(shape, generator).to(platform.device(), dtype).requires_grad_() for shape in shapes]
    output = function(*inputs)
    weights = drawn(tuple(output.shape), generator).to(platform.device(), output.dtype)
    gradients = torch.autograd.grad((output * weights).sum(), inputs)
    parts = ("result", *(f"gradient {number}" for number in range(len(inputs))))
    found = {
        f"operator: {name}: {part}": tensor.detach().float().cpu()
        for part, tensor in zip(parts, (output, *gradients), strict=True)
    }
    with torch.no_grad():  # another operator may answer where nothing is trained
        found[f"operator: {name}: result, untrained"] = function(*inputs).float().cpu()
    return found


def random_state(platform: Platform) -> Values:
    """Zeros where the random state can be put back, on the device and on the host."""
    platform.seed(7)
    host, device = torch.get_rng_state(), platform.device_rng_state()
    first = torch.randn(64, device=platform.device())
    torch.set_rng_state(host)
    if device is not None:
        platform.set_device_rng_state(device)
    again = torch.randn(64, device=platform.device())
    return {"random state: put back": (again - first).float().cpu()}
