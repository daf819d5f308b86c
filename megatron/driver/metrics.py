"""What a run tells about itself: the screen, SAVE/metrics.jsonl, TensorBoard, W&B, SwanLab."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megatron.driver.arguments import DriverArguments
from megatron.driver.boards import Board, open_boards
from megatron.driver.initialize import is_rank_0
from megatron.driver.records import METRICS_FILE, cut_records
from megatron.driver.screen import open_screen
from megatron.driver.state import TrainState
from megatron.driver.steps import StepMetrics, rates
from mindspeed_mm.errors import CheckpointError

logger = logging.getLogger(__name__)


class Recorder:
    """Writes the metrics of each step; does something on rank 0 only."""

    def __init__(self, state: TrainState, args: DriverArguments) -> None:
        self._state, self._args = state, args
        self._window: list[StepMetrics] = []
        self._file = self._screen = None
        self._boards: list[Board] = []
        self._path = Path(args.save or "", METRICS_FILE)
        self._told: set[Path] = set()
        if not is_rank_0():
            return
        self._screen = open_screen(state, args)
        if args.save is not None:
            cut_records(self._path, state.iteration)
            self._file = self._path.open("ab", buffering=0)
        self._boards = open_boards(args, state.iteration)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._screen is not None:
            self._screen.close()
        if self._file is not None:
            self._file.close()
        for board in self._boards:
            with contextlib.nullcontext() if error is None else contextlib.suppress(OSError):
                board.close(error)

    def add(self, step: StepMetrics, memory: float) -> None:
        """Record a step that has just been counted in the state; `memory`: MiB of the fullest rank at its peak, where
        the step has a log line."""
        if self._screen is None:
            return
        self._window.append(step)
        self._write_record(step)
        due = self._args.is_logged(self._state.iteration)
        self._screen.step(memory, self._window, due=due)
        if due:
            self._window.clear()

    def flush(self) -> None:
        """Make the records of all steps so far durable; called before a checkpoint is written."""
        if self._file is not None:
            with self._on_disk(self._path):
                os.fsync(self._file.fileno())
        for board in self._boards:
            with self._on_disk(board.folder):
                board.flush()

    @contextlib.contextmanager
    def _on_disk(self, path: Path) -> Iterator[None]:
        """What becomes of a full disk, which --on-save-error says."""
        try:
            yield
        except OSError as error:
            if error.errno is None:  # of a board's network
                raise
            text = f"{path} cannot be written: {error}. Make room there: until then records of steps are lost"
            if self._args.on_save_error == "stop":
                raise CheckpointError(text) from error
            if path not in self._told:
                logger.error("%s", text)
            self._told.add(path)

    def _write_record(self, step: StepMetrics) -> None:
        iteration = self._state.iteration
        if self._file is not None:
            record = {"iteration": iteration, "consumed_samples": self._state.consumed_samples} | step.record
            with self._on_disk(self._path):
                append_line(self._file, f"{json.dumps(record)}\n".encode())
        if self._boards:
            known = {**step.record, **rates([step], self._state, self._args)}
            values = {name: value for name, value in known.items() if value is not None}
            for board in self._boards:
                with self._on_disk(board.folder):
                    board.add(values, iteration)


def append_line(file: BinaryIO, line: bytes) -> None:
    """The whole line, or nothing of it and OSError: what comes behind half a line could not be read."""
    before = os.fstat(file.fileno()).st_size
    try:
        if file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        file.truncate(before)
        raise
