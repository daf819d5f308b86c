"""When and how a run saves: at once, or in the background while training goes on (--async-save).

In the background means in a thread of each rank. What training changes is copied to host memory first; the thread then
does what a save at once does, with a process group of its own, so that it never meets the collectives of the training.
The tracker moves last here, too: a checkpoint exists when it is whole on every rank, and not before.
"""

from __future__ import annotations

import datetime
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from megatron.driver.arguments import DriverArguments
from megatron.driver.checkpoint.checkpointing import Snapshot, take_snapshot, write_snapshot
from megatron.driver.collectives import agree
from megatron.driver.initialize import is_rank_0
from megatron.driver.state import Hooks, TrainState
from mindspeed_mm.errors import CheckpointError

logger = logging.getLogger(__name__)

LONGEST_SAVE = datetime.timedelta(hours=12)
"""Ranks wait for the slowest disk; that one of them is lost, the watch notices."""


class SaveClock:
    """Says when --save-interval-minutes are over, by rank 0's clock, one that cannot be set."""

    def __init__(self, args: DriverArguments) -> None:
        self._minutes = args.save_interval_minutes
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self._start = time.monotonic()

    def is_due(self) -> bool:
        """The same answer on every rank. Collective where the flag is given."""
        if self._minutes is None:
            return False
        return agree(lambda: time.monotonic() - self._start >= 60 * self._minutes)


class Saver:
    """Writes the checkpoints of a run. A context: leaving it waits for the one that is under way, except
    after a KeyboardInterrupt."""

    def __init__(self, state: TrainState, args: DriverArguments, hooks: Hooks) -> None:
        self._state, self._args, self._hooks = state, args, hooks
        self._group = self._thread = None
        if args.save is not None:
            # Also apart from the device's backend, whose time limit is meant for steps.
            self._group = torch.distributed.new_group(backend="gloo", timeout=LONGEST_SAVE)
        if args.async_save:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._running: Future[Path] | None = None
        self._problem: CheckpointError | None = None
        self.last: Path | None = None
        """The last checkpoint that was written."""

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        if self._thread is not None and kind is KeyboardInterrupt:  # Ctrl-C twice
            self._thread.shutdown(wait=False, cancel_futures=True)
            return
        try:
            self.wait()
            if kind is None and self._problem is not None:
                raise self._problem
        except CheckpointError as error:
            if kind is None:
                raise
            logger.error("%s", error)  # what stops the run is on its way already
        finally:
            if self._thread is not None:
                self._thread.shutdown()

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save in the background has failed."""
        return self._running is not None and self._running.done() and self._running.exception() is not None

    def save(self) -> None:
        """Begin to save, after an earlier save has ended; without --async-save also end it. Collective.

        Raises:
            CheckpointError: this save, or the one before in the background, failed, and --on-save-error is stop.
        """
        self.wait()
        self._problem = None
        start = time.perf_counter()
        try:
            snapshot = self._take_snapshot()
            if self._thread is None:
                self.last = write_snapshot(snapshot, self._args, self._group)
                return
        except CheckpointError as error:
            self._handle(error)
            return
        self._running = self._thread.submit(write_snapshot, snapshot, self._args, self._group)
        if is_rank_0():
            logger.info(
                "saving iteration %d in the background; training waited %.2f s",
                *(snapshot.iteration, time.perf_counter() - start),
            )

    def wait(self) -> None:
        """Wait until no save is under way. Collective in so far as its ranks do so together.

        Raises:
            CheckpointError: it failed, and --on-save-error is stop.
        """
        running, self._running = self._running, None
        if running is None:
            return
        try:
            self.last = running.result()
        except CheckpointError as error:
            self._handle(error)

    def _handle(self, error: CheckpointError) -> None:
        if self._args.on_save_error == "stop":
            raise error
        self._problem = error
        logger.error("%s. Training goes on, as --on-save-error says; the last save must succeed", error)

    def _take_snapshot(self) -> Snapshot:
        """All parameters gathered, which --overlap-param-gather otherwise does in the next forward pass."""
        for chunk in self._state.model:
            if self._args.overlap_param_gather:
                chunk.disable_forward_pre_hook()
        try:
            return take_snapshot(self._state, self._args, self._hooks, copy=self._args.async_save)
        finally:
            for chunk in self._state.model:
                if self._args.overlap_param_gather:
                    chunk.enable_forward_pre_hook()
