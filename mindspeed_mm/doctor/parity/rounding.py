"""Rows so long that bfloat16 shows where it was computed in: kernels keep scores, exponentials and sums in float32.

A kernel that rounds its result, and the weights that it multiplies the values by, errs by some 2e-3 of the result, in
another direction at each element. Two things are told apart from that:
- Scores in bfloat16. Where they are large, their rounding changes the weights by several percent (`rounding`).
- A sum in bfloat16, of squares or of exponentials. All of a row is too large or too small then by the same factor,
  which the other errors hardly have (`row scale`; not of large scores, where a few keys decide).

Legend: B batch, H query heads, G key/value heads, S queries, K keys, D channels of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from mindspeed_mm.doctor.parity.operators import Case, Values, drawn
from mindspeed_mm.platform import Platform
from mindspeed_mm.platform.segments import Segments

B, H, G, S, K, D = 4, 4, 2, 32, 4096, 64
WHOLE = 512
"""Positions of a row all of which ask."""

ROWS, CHANNELS = 64, 4096
"""Of a norm."""

SHARP, FLAT = 6 * D**-0.5, 0.25 * D**-0.5
"""Factors on the scores: a few keys have all the weight, or each has some."""


def compute(platform: Platform, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Values]]]:
    """(name, function) of every case; the function gives its results, float32 on the CPU, by name."""
    for number, (name, function, inputs, scaled) in enumerate(_cases(platform)):
        yield f"rounding: {name}", functools.partial(_compute, platform, dtype, number, name, function, inputs, scaled)


def _cases(platform: Platform) -> Iterator[tuple[str, Case, Callable, bool]]:
    """(name, function, its inputs of a generator, whether the scale of its rows counts)."""
    for kind, scale in {"large scores": SHARP, "small scores": FLAT}.items():
        everything = {"mask": None, "causal": False, "scale": scale, "dropout": 0.0}
        attend = functools.partial(platform.attention, **everything)
        flat = scale == FLAT
        yield f"attention, {kind}", attend, _heads((1, H, S, D), (1, G, K, D), flat), flat
        yield f"attention of one new token, {kind}", attend, _heads((B, H, 1, D), (B, G, K, D), flat), flat
        yield (
            f"attention in sequences of a row, {kind}",
            functools.partial(_inside, platform, scale),
            _heads((WHOLE, H, D), (WHOLE, G, D), flat),
            flat,
        )
        yield (
            f"attention of continued sequences, {kind}",
            functools.partial(_continued, platform, scale),
            _heads((2 * S, H, D), (K + K // 2, G, D), flat),
            flat,
        )
    weights = ((CHANNELS,), (CHANNELS,))
    yield "rms_norm", lambda x, weight: platform.rms_norm(x, weight, 1e-5), _rows(1, weights[:1]), True
    yield (
        "add_rms_norm",
        lambda x, residual, weight: platform.add_rms_norm(x, residual, weight, 1e-5)[1],
        _rows(2, weights[:1]),
        True,
    )
    yield "layer_norm", lambda x, weight, bias: F.layer_norm(x, (CHANNELS,), weight, bias), _rows(1, weights), True


def _inside(platform: Platform, scale: float, *rows: torch.Tensor) -> torch.Tensor:
    segments = Segments.of_lengths((WHOLE,), platform.device())
    return platform.segment_attention(*rows, segments, scale=scale, dropout=0.0, causal=False)


def _continued(platform: Platform, scale: float, *rows: torch.Tensor) -> torch.Tensor:
    new, whole = (Segments.of_lengths(lengths, platform.device()) for lengths in ((S, S), (K, K // 2)))
    return platform.continued_attention(*rows, new, whole, scale=scale)


def _heads(query: tuple[int, ...], keys: tuple[int, ...], flat: bool) -> Callable:
    """Queries, keys and values; with small scores, values whose mean is not 0, or the results would be next to it."""

    def make(generator: torch.Generator) -> list[torch.Tensor]:
        found = [drawn(shape, generator) for shape in (query, keys, keys)]
        return [*found[:2], found[2] + 1] if flat else found

    return make


def _rows(inputs: int, weights: tuple[tuple[int, ...], ...]) -> Callable:
    """Rows of different sizes, none of them 1: a factor next to 1 would be rounded alike at all elements."""

    def make(generator: torch.Generator) -> list[torch.Tensor]:
        sizes = torch.linspace(0.6, 1.7, ROWS)[:, None]
        found = [drawn((ROWS, CHANNELS), generator) * sizes for _ in range(inputs)]
        return found + [drawn(shape, generator) for shape in weights]

    return make


def _compute(
    platform: Platform, dtype: torch.dtype, number: int, name: str, function: Case, inputs: Callable, scaled: bool
) -> Values:
    made = inputs(torch.Generator().manual_seed(number))
    own = [x.bfloat16().to(platform.device(), dtype).requires_grad_() for x in made]
    results = {"result": function(*own).detach()}
    with torch.no_grad():  # another operator may answer where nothing is trained
        results["result, untrained"] = function(*own)
    kinds = ("rounding", "row scale") if scaled else ("rounding",)
    return {
        f"{kind}: {name}: {part}": value.to("cpu", torch.float32, copy=True)
        for kind in kinds
        for part, value in results.items()
    }
