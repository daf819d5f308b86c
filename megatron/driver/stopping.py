"""How a run is told to stop: signals are remembered, the step that runs is finished and saved."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

from mindspeed_mm.ending import heard

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""A terminal sends SIGINT at Ctrl-C, and SIGHUP when it is closed or its connection is lost, which nohup has ignored.
Slurm sends SIGTERM at the time limit, and SIGUSR1 before it with `--signal=USR1@seconds`."""


class StopRequest:
    """Context in which STOP_SIGNALS are remembered instead of killing the process.

    Who presses Ctrl-C twice does not want to wait: a SIGINT or SIGTERM (which torchrun makes of the second one) after
    a SIGINT raises KeyboardInterrupt. The others may come several times: torchrun and Slurm both send them.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """The first that has come."""
        self._previous: dict[int, Any] = {}
        self._installed = threading.current_thread() is threading.main_thread()

    @property
    def received(self) -> bool:
        """Whether this process was told to stop."""
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        if self._installed:
            self._previous = {number: signal.signal(number, self._remember) for number in heard(*STOP_SIGNALS)}
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: Any) -> None:
        if self.signal == signal.SIGINT and number in (signal.SIGINT, signal.SIGTERM):
            raise KeyboardInterrupt
        self.signal = self.signal or number
