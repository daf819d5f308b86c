"""What a run shows while it trains: a short line, a live table on a terminal, or Megatron's line (--log-format)."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron.driver.arguments import DriverArguments
from megatron.driver.log_lines import Figure, Pace, duration, figures, megatron_line, place, short_line
from megatron.driver.state import TrainState
from megatron.driver.steps import StepMetrics

logger = logging.getLogger(__name__)

ROWS = 12
"""Lines that the live table keeps."""
BETWEEN = 0.1
"""Seconds between two drawings of the live table, at least."""
BAR = 40
FIRST_TO_GO = ("padding", "of peak", "data wait", "TFLOP/s", "memory", "grad norm")
"""Columns that a narrow terminal does without, this one first."""


class Screen(Protocol):
    """Shows the steps of a run, on rank 0."""

    def step(self, memory: float, window: Sequence[StepMetrics], *, due: bool) -> None:
        """A step has been counted in the state. `window`: those since the last one that was `due`; `memory`: MiB of the
        fullest rank at its peak, told where the step is due."""

    def close(self) -> None:
        """The run is over."""


class ShortLines:
    """One line at each step that is logged."""

    def __init__(self, state: TrainState, args: DriverArguments, pace: Pace | None = None) -> None:
        self._state, self._args, self._pace = state, args, pace or Pace()

    def step(self, memory: float, window: Sequence[StepMetrics], *, due: bool) -> None:
        """See Screen."""
        self._pace.count()
        if due:
            left = self._pace.left(self._args.train_iters - self._state.iteration)
            shown = figures(self._state, self._args, window, memory, left)
            logger.info("%s", short_line(place(self._state, self._args), shown))

    def close(self) -> None:
        """See Screen."""


class MegatronLines:
    """Megatron's line at each step that is logged, and once its line about memory."""

    def __init__(self, state: TrainState, args: DriverArguments) -> None:
        self._state, self._args = state, args
        self._memory_shown = False

    def step(self, memory: float, window: Sequence[StepMetrics], *, due: bool) -> None:
        """See Screen."""
        if due:
            logger.info("%s", megatron_line(self._state, self._args, window))
            self._show_memory()

    def _show_memory(self) -> None:
        if self._memory_shown:
            return
        self._memory_shown = True
        memory = self._state.platform.memory()
        logger.info(
            "[Rank 0] (after %d iterations) memory (MB) | allocated: %.1f | max allocated: %.1f | device: %.1f",
            *(self._state.iteration, memory.allocated, memory.peak, memory.total),
        )

    def close(self) -> None:
        """See Screen."""


class LiveTable:
    """The last lines as a table with a bar below, drawn again and again; what is logged meanwhile stands above it."""

    def __init__(
        self,
        state: TrainState,
        args: DriverArguments,
        console: Console,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state, self._args, self._console, self._pace = state, args, console, pace or Pace()
        self._clock, self._drawn = clock, float("-inf")
        self._rows: deque[tuple[int, list[Figure]]] = deque(maxlen=ROWS)
        self._live: Live | None = None

    def step(self, memory: float, window: Sequence[StepMetrics], *, due: bool) -> None:
        """See Screen."""
        self._pace.count()
        if due:
            self._rows.append((self._state.iteration, figures(self._state, self._args, window, memory, None)))
        if self._live is None:  # not before the first step: processes that prepare data must not inherit a live screen
            # No thread draws it: a process that is ended at once must leave the terminal as it was.
            self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False)
            with contextlib.suppress(OSError):
                self._live.start()
                self._console.show_cursor(True)
        if due or self._clock() - self._drawn >= BETWEEN:
            self._draw()

    def _draw(self) -> None:
        assert self._live is not None
        self._drawn = self._clock()
        with contextlib.suppress(OSError):  # the terminal has been closed
            self._live.update(Group(*([self._table()] if self._rows else []), self._progress()), refresh=True)

    def _table(self) -> Table:
        """Columns of the figures that have a heading; a narrow terminal gets the more important ones."""
        rows = [(step, [figure for figure in shown if figure.heading]) for step, shown in self._rows]
        widths = {"step": max(len("step"), len(str(self._state.iteration)))}
        for figure in (figure for _, shown in rows for figure in shown):
            word = max(map(len, figure.heading.split()))
            widths[figure.heading] = max(widths.get(figure.heading, 0), word, len(figure.value))
        for heading in FIRST_TO_GO:
            if sum(widths.values()) + len(widths) + 1 > self._console.width:
                widths.pop(heading, None)
        spacious = sum(widths.values()) + 3 * len(widths) + 1 <= self._console.width
        table = Table(box=SIMPLE_HEAD, padding=(0, 1 if spacious else 0), pad_edge=False)
        for heading, width in widths.items():
            table.add_column(heading, justify="right", width=width)
        for step, shown in rows:
            table.add_row(str(step), *(figure.value for figure in shown if figure.heading in widths))
        return table

    def _progress(self) -> Table:
        """The bar, the steps and the time left."""
        done, total = self._state.iteration, self._args.train_iters
        left = self._pace.left(total - done)
        text = f"step {done} of {total} ({100 * done // total} %)"
        line = Table.grid(padding=(0, 1))
        line.add_row(
            ProgressBar(total=total, completed=done, width=BAR),
            Text(text if left is None else f"{text}, {duration(left)} left"),
        )
        return line

    def close(self) -> None:
        """See Screen."""
        if self._live is not None:
            self._draw()
            with contextlib.suppress(OSError):
                self._live.stop()
            self._live = None


def open_screen(state: TrainState, args: DriverArguments) -> Screen:
    """The screen that --log-format asks for. "auto" is the live table where standard error is a terminal."""
    form = args.log_format
    console = Console(stderr=True, force_terminal=True if form == "table" else None)
    if form == "auto":
        form = "table" if console.is_terminal and not console.is_dumb_terminal else "short"
    if form == "megatron":
        return MegatronLines(state, args)
    return LiveTable(state, args, console) if form == "table" else ShortLines(state, args)
