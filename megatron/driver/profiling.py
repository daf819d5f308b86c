"""--profile: a trace of some steps by torch's profiler, and a table of where their time went.

The trace is a JSON file for chrome://tracing or Perfetto. The table is made from it: every moment of a profiled step
belongs to one line, so the lines add up to the step. Communication is what no computation runs beside; other time
belongs to the innermost region (mindspeed_mm/platform/regions.py) around it.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron.driver.arguments import DriverArguments
from mindspeed_mm.platform import Platform
from mindspeed_mm.platform.regions import PREFIX, recording, region

logger = logging.getLogger(__name__)

STEP = "whole step"
OTHER = "other (host)"
COMMUNICATION = "communication"
COLLECTIVES = ("gloo:", "nccl", "hccl", "hcom", "c10d::", "allreduce", "allgather", "reducescatter")
"""What the names of events hold that are collectives, of any back end."""
COMPUTING = ("aten::", "autograd::engine")
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of what runs on a device in a trace."""

Span = tuple[float, float]


class Profiler:
    """Profiles the steps from --profile-step-start to before --profile-step-end; does nothing without --profile."""

    def __init__(self, args: DriverArguments, platform: Platform) -> None:
        self._args, self._platform = args, platform
        self._rank = torch.distributed.get_rank()
        self._wanted = args.profile and (-1 in args.profile_ranks or self._rank in args.profile_ranks)
        self._stack: contextlib.ExitStack | None = None
        self._profile: torch.profiler.profile | None = None

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *error: object) -> None:
        if self._stack is not None:
            self._end()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step `number` (the first is 1)."""
        if self._wanted and self._stack is None and number == self._args.profile_step_start:
            self._begin()
        with region(STEP):
            yield
        if self._stack is not None and number >= self._args.profile_step_end - 1:
            self._end()

    def _begin(self) -> None:
        self._stack = contextlib.ExitStack()
        self._profile = self._stack.enter_context(self._platform.profiler())
        # Every rank of a collective waits for its device alike only if it does so at all: ranks that are not profiled
        # run on as usual and merely wait for this one.
        self._stack.enter_context(recording(self._platform.synchronize))

    def _end(self) -> None:
        self._stack.close()
        self._stack = None
        folder = trace_folder(self._args)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"trace_rank{self._rank}_step{self._args.profile_step_start}.json"
        self._profile.export_chrome_trace(str(path))
        logger.info("profile of rank %d: %s\n%s", self._rank, path, table(read_trace(path)))
        if choices := self._platform.choices():
            logger.info("chosen for this machine:\n%s", choices)


def trace_folder(args: DriverArguments) -> Path:
    """Where traces go: --profile-dir, else SAVE/profile."""
    return Path(args.profile_dir) if args.profile_dir is not None else Path(args.save) / "profile"


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Complete events of a chrome trace."""
    events = json.loads(path.read_text(encoding="utf-8"))
    events = events["traceEvents"] if isinstance(events, dict) else events
    return [event for event in events if event.get("ph") == "X" and "dur" in event]


def shares(events: list[dict[str, Any]]) -> dict[str, float]:
    """Microseconds of each region over the profiled steps, largest first; they add up to the steps' time."""
    ranges = _ranges(events)
    steps = [_span(event) for event in ranges if event["name"] == PREFIX + STEP]
    collectives = _united([_span(event) for event in events if _is_collective(event)])
    kernels = [_span(event) for event in events if event.get("cat") in KERNELS and not _is_collective(event)]
    computing = kernels or [_span(event) for event in events if event["name"].startswith(COMPUTING)]
    waits = _without(collectives, _united(computing))
    found: dict[str, float] = {}
    for step in steps:
        exposed = _within(waits, step)
        if exposed:
            found[COMMUNICATION] = found.get(COMMUNICATION, 0.0) + _length(exposed)
        for name, spans in _innermost(ranges, step).items():
            found[name] = found.get(name, 0.0) + _length(_without(spans, exposed))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def table(events: list[dict[str, Any]]) -> str:
    """The shares as text."""
    found = shares(events)
    total = sum(found.values())
    steps = sum(event["name"] == PREFIX + STEP for event in _ranges(events))
    lines = [f"{'where a step goes':24s} {'ms':>10s} {'%':>7s}"]
    lines += [f"{name:24s} {time / steps / 1000:10.2f} {100 * time / total:7.2f}" for name, time in found.items()]
    return "\n".join([*lines, f"{'sum':24s} {total / steps / 1000:10.2f} {100.0:7.2f}"])


def _ranges(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The regions as the host ran through them; the device's copies of them are left out."""
    return [e for e in events if e["name"].startswith(PREFIX) and not e.get("cat", "").startswith("gpu_")]


def _is_collective(event: dict[str, Any]) -> bool:
    """Whether an event is communication; an asynchronous one's call is over at once and counts no more than that."""
    name = event["name"].lower()
    return any(word in name for word in COLLECTIVES) and not name.startswith("aten::")


def _span(event: dict[str, Any]) -> Span:
    return event["ts"], event["ts"] + event["dur"]


def _innermost(ranges: list[dict[str, Any]], step: Span) -> dict[str, list[Span]]:
    """Region -> the time of a step in which no region inside it runs."""
    inside = [event for event in ranges if _overlap(_span(event), step)]
    result: dict[str, list[Span]] = {}
    for event in inside:
        start, end = _span(event)
        inner = [
            _span(other) for other in inside if other is not event and start <= other["ts"] and _ends(other) <= end
        ]
        name = event["name"].removeprefix(PREFIX)
        own = _without(_within([(start, end)], step), _united(inner))
        result.setdefault(OTHER if name == STEP else name, []).extend(own)
    return result


def _ends(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]


def _overlap(span: Span, other: Span) -> bool:
    return span[0] < other[1] and other[0] < span[1]


def _united(spans: list[Span]) -> list[Span]:
    """The same time as spans that do not overlap, in order."""
    result: list[Span] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def _within(spans: list[Span], limit: Span) -> list[Span]:
    return [(max(start, limit[0]), min(end, limit[1])) for start, end in spans if _overlap((start, end), limit)]


def _without(spans: list[Span], taken: list[Span]) -> list[Span]:
    """What is left of `spans` outside `taken`, whose spans are in order and do not overlap."""
    result = []
    for start, end in spans:
        for first, last in taken:
            if last <= start:
                continue
            if first >= end:
                break
            if first > start:
                result.append((start, first))
            start = max(start, last)
        if start < end:
            result.append((start, end))
    return result


def _length(spans: list[Span]) -> float:
    return sum(end - start for start, end in spans)
