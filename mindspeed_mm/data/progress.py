"""A progress bar on stderr for what takes longer than two seconds."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

QUIET_SECONDS = 2.0
"""Work that ends earlier shows nothing."""


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields `advance(steps)`. The bar appears after QUIET_SECONDS and says how much is done and how long it takes.

    Of several ranks the first one shows it: they share work evenly, so that its share done is the share of all.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(file=sys.stderr))
    task = progress.add_task(title, total=total)
    begin = time.monotonic()
    pending, shown, quiet = 0, False, os.environ.get("RANK", "0") != "0"

    def advance(steps: int) -> None:
        nonlocal pending, shown
        pending += steps
        # One look at the clock in a while: work items take microseconds.
        if pending < total / 1000 and pending < 1000:
            return
        if not shown and not quiet and time.monotonic() - begin > QUIET_SECONDS:
            progress.start()
            shown = True
        progress.advance(task, pending)
        pending = 0

    try:
        yield advance
    finally:
        if shown:
            progress.advance(task, pending)
            progress.stop()
