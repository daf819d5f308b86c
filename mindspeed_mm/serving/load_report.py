"""Figures and a drawing of a load test."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_mm.serving.open_loop import LoadPlan, LoadRecord, good

PERCENTILES = (50, 90, 95, 99)


def report(plan: LoadPlan, records: Sequence[LoadRecord]) -> dict[str, Any]:
    """The figures of a run; times in seconds.

    `seconds_per_token` of a request is the time between its first and its last piece of text, divided by its tokens
    but one. Throughput is over the time from the first arrival to the last end, errors left out.
    """
    answered = good(records)
    seconds = max((record.arrival + record.end for record in records), default=0.0)
    tokens = sum(record.new_tokens for record in answered)
    errors = Counter(record.error for record in records if record.error is not None)
    return {
        "plan": dataclasses.asdict(plan),
        "seconds": seconds,
        "answered": len(answered),
        "errors": dict(sorted(errors.items())),
        "requests_per_second": len(answered) / seconds if seconds else 0.0,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "prompt_tokens": sum(record.prompt_tokens for record in answered),
        "new_tokens": tokens,
        "first_text": spread([record.first_text for record in answered if record.first_text is not None]),
        "seconds_per_token": spread([each for record in answered if (each := per_token(record)) is not None]),
        "request": spread([record.end for record in answered]),
        "sent_late": spread([record.late for record in records]),
    }


def per_token(record: LoadRecord) -> float | None:
    """Seconds of a token behind the first one; None where there is none."""
    if len(record.pieces) < 2 or record.new_tokens < 2:
        return None
    return (record.pieces[-1] - record.pieces[0]) / (record.new_tokens - 1)


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, percentiles and maximum; None of nothing."""
    if not values:
        return None
    found = {f"p{share}": float(np.percentile(values, share)) for share in PERCENTILES}
    return {"mean": float(np.mean(values)), **found, "max": float(max(values))}


def draw(path: Path, records: Sequence[LoadRecord], title: str) -> None:
    """Write a PNG: how many requests waited no longer than so, and how many were there at each time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    answered = good(records)
    times = {
        "first text": [record.first_text for record in answered if record.first_text is not None],
        "whole answer": [record.end for record in answered],
    }
    for name, values in times.items():
        if values:
            left.step(np.sort(values), np.arange(1, len(values) + 1) / len(values), where="post", label=name)
    left.set(xlabel="seconds after arrival", ylabel="share of the answered requests", ylim=(0, 1.02))
    if answered:
        left.legend(loc="lower right")
    changes = sorted([(r.arrival, 1) for r in records] + [(r.arrival + r.end, -1) for r in records])
    right.step([at for at, _ in changes], np.cumsum([change for _, change in changes]), where="post")
    lost = [record.arrival + record.end for record in records if record.error is not None]
    if lost:
        right.plot(lost, [0] * len(lost), "rx", label=f"{len(lost)} errors")
        right.legend()
    right.set(xlabel="seconds", ylabel="requests in flight", ylim=(-0.5, None))
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
