"""The loader's worker processes: what they leave to the training process, and how they end with it."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

from mindspeed_mm import ending
from mindspeed_mm.errors import DataError
from mindspeed_mm.platform import host_memory

logger = logging.getLogger(__name__)

ALLOWED_TO_END = 3.0
"""Seconds in which workers end by themselves; a DataLoader waits 10 for each that stands in a slow read."""


def settle(_worker: int) -> None:
    """First act of a worker: it leaves the signals that stop a run to the training process, and ends with that.

    torchrun sends SIGTERM to process groups, a terminal SIGINT and SIGHUP, Slurm both and SIGUSR1 to everything; a
    worker that ended would take the run with it before it has saved. A second SIGTERM ends the worker: that is how a
    DataLoader ends those that do not listen.
    """
    os.setpgid(0, 0)
    host_memory.return_freed()
    ending.belong_to_parent()
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def batches(loader: DataLoader) -> Iterator[Any]:
    """What the loader yields. Its workers end when this generator is closed, has raised, or is freed.

    Raises:
        DataError: a worker was killed from outside.
    """
    iterator = _without_sudden_errors(loader)
    try:
        yield from _named(iterator)
    finally:
        _end(iterator)


def _without_sudden_errors(loader: DataLoader) -> Iterator[Any]:
    """The loader's iterator, whose workers' deaths are told where batches are asked for. torch has its own handler of
    SIGCHLD tell them, wherever the training is at that moment: in a backward pass, or in the middle of a save."""
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)  # torch sets no handler there
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, before)


def _named(iterator: Iterator[Any]) -> Iterator[Any]:
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            cause = str(error).splitlines()[0]
            raise DataError(
                f"a process that prepares data was ended from outside ({cause}). Most often the host has no memory "
                "left: lower --num-workers, or prefetch_factor in the data config"
            ) from None
        yield batch


def _end(iterator: Any) -> None:
    """Stop the workers now. Freeing the iterator would do it, but the error on its way holds on to it; and the end of
    the interpreter tells each worker only once, which they leave to the training process."""
    workers = getattr(iterator, "_workers", ())  # none where the data is read in this process
    if not workers:
        return
    hurry = threading.Timer(ALLOWED_TO_END, _kill, [workers])
    try:
        hurry.start()  # not at the end of the interpreter, where no thread begins
        iterator._shutdown_workers()
    finally:
        hurry.cancel()
        _kill(workers)
    for worker in workers:
        worker.join(1.0)


def _kill(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()
