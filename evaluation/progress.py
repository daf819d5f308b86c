"""The progress bar of an evaluation: the answers of every copy of the model, whichever ranks they come from."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from evaluation.engine import Communicator

BETWEEN = 0.5
"""Seconds between two looks at the number of answers while this rank has none to give."""


class AnswersBar:
    """A bar on rank 0's stderr. Every rank tells it of its answers."""

    def __init__(self, name: str, communicator: Communicator, *, show: bool = True) -> None:
        """Make it before the last exchange that precedes the first answer: it looks at what was counted before."""
        self._name, self._communicator, self._shown = name, communicator, show
        self._before = communicator.count(0) if show else 0
        self._bar: Progress | None = None
        self._over = threading.Event()

    @contextmanager
    def asking(self, total: int) -> Iterator[None]:
        """Around the answering: `total` questions are open on all copies together."""
        if not (self._shown and total and self._communicator.rank == 0):
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=Console(stderr=True))
        self._task = self._bar.add_task(self._name, total=total)
        with self._bar:
            try:
                yield
                self._show(self._communicator.count(0))
            finally:
                self._over.set()

    def advance(self) -> None:
        """This rank has one more answer."""
        if self._shown and self._communicator.is_leader:
            self._show(self._communicator.count(1))

    def wait_for_others(self) -> None:
        """This rank has no more questions: from now on the bar follows the others until the end of `asking`."""
        if self._bar is not None and self._communicator.world_size > 1:
            threading.Thread(target=self._watch, name="answers", daemon=True).start()

    def _watch(self) -> None:
        while not self._over.wait(BETWEEN):
            try:
                self._show(self._communicator.count(0))
            except RuntimeError:  # whoever counts has gone; the exchange of answers says so
                return

    def _show(self, answers: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=answers - self._before)
