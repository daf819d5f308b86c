"""A pool of worker processes joined by gloo, for tests over several ranks.

Importing torch, megatron.core and transformers takes seconds. One server process does it for all pools, and the workers
are its forks. (Those of another device than the CPU are processes of their own: it changes what is imported.) They are
used by many tests. Each call gets a fresh process group. A worker that hangs is killed when the call's time is up, and
the pool starts anew for the next.
"""

from __future__ import annotations

import gc
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT = 120.0
"""Seconds that a call may take."""

GRACE = 3.0
"""Seconds that the other ranks get to end after one has failed: they may wait for it in a collective."""


IMPORTED = "tests.helpers.imported"
"""What the workers of the CPU find imported."""


class RankError(AssertionError):
    """A rank raised or did not answer; the message holds the remote traceback."""


class RankPool:
    """`size` processes; `run` calls one function on all of them."""

    def __init__(self, size: int, device: str = "cpu", folders: tuple[str, ...] = ()) -> None:
        """`device` is the platform of the processes; `folders` come first on their path of modules."""
        self.size, self._device, self._folders = size, device, folders
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """Call `function(*args)` on every rank inside a process group; results in rank order.

        `function` must be importable (defined at the top of a module), its arguments and results picklable.

        Raises:
            RankError: a rank raised, died, or took longer than `timeout`.
        """
        if not self._workers:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, pipe) in enumerate(self._workers):
                pipe.send((rank, self.size, str(Path(folder) / "store"), function, args))
            results, errors = self._collect(timeout)
        if errors:
            if len(results) < self.size:
                self.close()
            raise RankError("\n".join(errors))
        return [results[rank] for rank in range(self.size)]

    def _start(self) -> None:
        own = self._device != "cpu" or self._folders
        context = multiprocessing.get_context("spawn" if own else "forkserver")
        if not own:
            context.set_forkserver_preload([IMPORTED])
        for _ in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self._device, self._folders), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _collect(self, timeout: float) -> tuple[dict[int, Any], list[str]]:
        results: dict[int, Any] = {}
        errors: list[str] = []
        pipes = {pipe: rank for rank, (_, pipe) in enumerate(self._workers)}
        end = time.monotonic() + timeout
        while pipes:
            ready = wait(list(pipes), max(0.0, end - time.monotonic()))
            if not ready:
                errors.append(f"rank(s) {sorted(pipes.values())} did not answer and were killed")
                break
            for pipe in ready:
                rank = pipes.pop(pipe)
                try:
                    results[rank], error = pipe.recv()
                except EOFError:
                    error = "the process died"
                if error is not None:
                    errors.append(f"rank {rank}: {error}")
                    end = min(end, time.monotonic() + GRACE)
        return results, errors

    def close(self) -> None:
        """Kill the workers; the next `run` starts new ones."""
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers = []


def _serve(pipe: Connection, device: str, folders: tuple[str, ...]) -> None:
    """Life of a worker: one call after the other until the pipe closes."""
    sys.path[:0] = folders
    import torch

    from mindspeed_mm.platform import get_platform

    torch.set_num_threads(1)
    platform = get_platform(device)
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from megatron.driver.checkpoint import locks
    from megatron.driver.initialize import shutdown

    imported = 0
    while True:
        if len(sys.modules) > imported:  # what was imported stays, and is not looked at again
            imported = len(sys.modules)
            gc.freeze()
        try:
            rank, size, store, function, args = pipe.recv()
        except EOFError:
            return
        try:
            torch.distributed.init_process_group(
                platform.backend, init_method=f"file://{store}", rank=rank, world_size=size
            )
            result, error = function(*args), None
            if torch.distributed.is_initialized():  # a whole command ends its process group itself
                torch.distributed.barrier()
        except BaseException:  # noqa: B036 - whatever a test does, its traceback goes to the caller
            result, error = None, traceback.format_exc()
        if error is None:
            shutdown()
            pipe.send((result, error))
        else:  # first the news: taking down a process group whose other ranks are stuck may take long
            locks.release_all()
            pipe.send((result, error))
            shutdown()
        del result, args
        RotaryEmbedding.forward.cache_clear()  # it holds modules, and through their hooks whole models
        # Models lie in cycles, and their process groups keep dozens of gloo's threads awake. A second time, since the
        # distributed optimizer's views hold the model's autograd nodes until they are freed themselves.
        gc.collect()
        gc.collect()
