"""The bytes of jobs in order: read or made by one thread while another writes them.

What is stored as it was (a tensor of the same type, or rows of several in another order) passes through small buffers
that are used again and again, so that it costs little more than a copy; all else is made as tensors.
"""

import contextlib
import functools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoint_converters.plan import Job, Output
from mindspeed_mm.errors import WeightError
from mindspeed_mm.weights.files import Span, damaged
from mindspeed_mm.weights.loading import check_finite, is_finite

BLOCK = 2**20
"""Bytes that are read, looked at and written at a time: they stay in the processor's cache."""

AHEAD, BYTES_AHEAD = 4, 128 * 2**20
"""Blocks, or jobs that make tensors, that are read before they are written, and their bytes (or one alone)."""


class Piece(NamedTuple):
    """Reads or makes the next `nbytes`; `load` may use the buffer that it is given, which nobody else then uses."""

    nbytes: int
    load: Callable[[memoryview], list[memoryview]]


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values, row by row."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


class Runner:
    """Reads and makes the tensors of jobs and looks for NaN and Inf.

    Raises WeightError for the first such tensor, or with `allow_nonfinite` lists them in `nonfinite` and the log.
    """

    def __init__(self, *, allow_nonfinite: bool = False) -> None:
        self.allow_nonfinite = allow_nonfinite
        self.nonfinite: list[str] = []

    def blocks(self, jobs: Sequence[Job]) -> Iterator[memoryview]:
        """The bytes of all outputs of all jobs in order. A block belongs to one output and is valid until the next."""
        buffers = [memoryview(bytearray(BLOCK)) for _ in range(AHEAD + 1)]
        pending: deque[tuple[int, Future[list[memoryview]]]] = deque()
        with contextlib.ExitStack() as stack:
            files = _Files()
            stack.callback(files.close)
            pool = ThreadPoolExecutor(1, thread_name_prefix="weights")
            stack.callback(pool.shutdown, cancel_futures=True)
            for number, piece in enumerate(self._pieces(jobs, files)):
                while len(pending) == AHEAD or pending and sum(n for n, _ in pending) + piece.nbytes > BYTES_AHEAD:
                    yield from pending.popleft()[1].result()
                pending.append((piece.nbytes, pool.submit(piece.load, buffers[number % len(buffers)])))
            while pending:
                yield from pending.popleft()[1].result()

    def _pieces(self, jobs: Sequence[Job], files: "_Files") -> Iterator[Piece]:
        for job in jobs:
            if job.spans is None:
                yield Piece(job.nbytes, lambda _, job=job: [as_bytes(tensor) for tensor in self.make(job)])
                continue
            for output, spans in zip(job.outputs, job.spans, strict=True):
                for runs in _packed(spans):
                    load = functools.partial(self._copy, job, output, runs, files)
                    yield Piece(BLOCK, load)

    def make(self, job: Job) -> list[Tensor]:
        """The tensors of one job."""
        made = job.make()
        for output, tensor in zip(job.outputs, made, strict=True):
            if tensor.shape != output.shape or tensor.dtype != output.dtype:
                raise WeightError(
                    f"{output.name} became {list(tensor.shape)} {tensor.dtype}; planned {list(output.shape)} "
                    f"{output.dtype}. The source changed while it was read; convert again."
                )
            self._check(output, tensor)
        return made

    def _copy(
        self, job: Job, output: Output, runs: list[Span], files: "_Files", buffer: memoryview
    ) -> list[memoryview]:
        done = 0
        for run in runs:
            files.read(run, buffer[done : done + run.nbytes])
            done += run.nbytes
        block = buffer[:done]
        if output.name not in self.nonfinite and not is_finite(torch.frombuffer(block, dtype=output.dtype)):
            self._check(output, job.make()[job.outputs.index(output)])
        return [block]

    def _check(self, output: Output, tensor: Tensor) -> None:
        advice = "Take another copy of damaged weights, or a wider --dtype where a narrow one made them."
        if not check_finite(tensor, output.name, allowed=self.allow_nonfinite, advice=advice):
            self.nonfinite.append(output.name)


def _packed(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Spans cut and grouped into runs of BLOCK bytes, the last one shorter. All spans hold whole values."""
    group: list[Span] = []
    room = BLOCK
    for span in spans:
        offset, left = span.offset, span.nbytes
        while left:
            taken = min(left, room)
            group.append(Span(span.path, offset, taken))
            offset, left, room = offset + taken, left - taken, room - taken
            if not room:
                yield group
                group, room = [], BLOCK
    if group:
        yield group


class _Files:
    """Source files that are open for reading."""

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}

    def read(self, span: Span, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a span."""
        if span.path not in self._handles:
            self._handles[span.path] = os.open(span.path, os.O_RDONLY)
        done = 0
        while done < span.nbytes:
            count = os.preadv(self._handles[span.path], [buffer[done:]], span.offset + done)
            if not count:
                raise damaged(span.path, "it became shorter while it was read")
            done += count

    def close(self) -> None:
        """Close all."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()
