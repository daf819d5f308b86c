"""Bytes done, speed and remaining time of a conversion, on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

QUIET_SECONDS = 2.0
"""Work that ends earlier shows nothing."""


@contextmanager
def bytes_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields `advance(bytes)`; the bar appears after QUIET_SECONDS."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    progress = Progress(*columns, TimeRemainingColumn(), console=Console(file=sys.stderr))
    task = progress.add_task(title, total=total)
    begin, shown = time.monotonic(), False

    def advance(count: int) -> None:
        nonlocal shown
        progress.advance(task, count)
        if not shown and time.monotonic() - begin > QUIET_SECONDS:
            progress.start()
            shown = True

    try:
        yield advance
    finally:
        if shown:
            progress.stop()
