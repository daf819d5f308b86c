"""What torchrun itself writes, out of the way of the run's own words.

`torchrun --logs-specs mindspeed_mm ...` (the launchers say it) loads `ReportToFile` in torchrun's process. When a rank
fails, the rank says why; torchrun's report about it, dozens of lines, then goes to a file, and one line names the file.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from types import TracebackType

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

REPORT_VARIABLE = "TORCHRUN_REPORT"
"""Environment variable that names the file."""

CAUSES = {
    signal.SIGKILL: "so it was ended from outside: most often since the host has no memory left",
    signal.SIGTERM: "so it was ended from outside",
    signal.SIGBUS: "most often since shared memory is full: docker run --shm-size=16g, or --num-workers 0",
}
ELSE = "a fault of a compiled library; what it wrote stands above"
"""Why a rank ended that could not say it."""

TORCHRUN_LOGGER = "torch.distributed"

HEARD_VARIABLE = "TORCHELASTIC_SIGNALS_TO_HANDLE"
"""Environment variable with the signals that end torchrun. An older torch knows none, and does not read it."""


class ReportToFile(DefaultLogsSpecs):
    """torchrun's default treatment of the ranks' output, with its own output in a file."""

    _listening: _EarlyInterrupt | None = None

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        report = report_path()
        handler = logging.FileHandler(report, delay=True, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger = logging.getLogger(TORCHRUN_LOGGER)
        logger.handlers[:] = [handler]
        logger.propagate = False
        sys.excepthook = _Report(report)
        if threading.current_thread() is threading.main_thread():
            self._listening = _EarlyInterrupt()

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """See DefaultLogsSpecs; torchrun asks right before it chooses the signals that it hears. It would hear SIGHUP
        even under nohup, and take the run with it when its terminal is closed."""
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        heard = os.environ.get(HEARD_VARIABLE)
        if heard is not None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            os.environ[HEARD_VARIABLE] = ",".join(name for name in heard.split(",") if name != "SIGHUP")
        return super().reify(envs)


class _EarlyInterrupt:
    """Ends torchrun at Ctrl-C while it waits for the launch's first host, until it is closed: torch's wait for a store
    lets no handler of Python's run. What starts the ranks has handlers of its own."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = signal.set_wakeup_fd(self._write)
        threading.Thread(target=self._wait, name="Ctrl-C", daemon=True).start()

    def _wait(self) -> None:
        while told := os.read(self._read, 1):
            if told[0] == signal.SIGINT:
                sys.stderr.write("torchrun: stopped by SIGINT\n")
                sys.stderr.flush()
                os._exit(128 + signal.SIGINT)
        os.close(self._read)

    def close(self) -> None:
        """Leave Ctrl-C to others."""
        signal.set_wakeup_fd(self._before)
        os.close(self._write)


def report_path() -> Path:
    """Where the report of this torchrun goes: REPORT_VARIABLE, else a file of its own in the folder for such files."""
    given = os.environ.get(REPORT_VARIABLE)
    return Path(given) if given else Path(tempfile.gettempdir()) / f"torchrun_{os.getpid()}.log"


class _Report:
    """Takes the place of sys.excepthook."""

    def __init__(self, report: Path) -> None:
        self._report = report

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(f"torchrun: {summary(error)}{self._write(kind, error, trace)}\n")
        sys.stderr.flush()

    def _write(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> str:
        """Append the traceback; what the screen says about it."""
        text = "".join(traceback.format_exception(kind, error, trace))
        try:
            with self._report.open("a", encoding="utf-8") as stream:
                stream.write(text)
        except OSError as problem:
            return f"; its report could not be written to {self._report} ({problem.strerror}):\n{text}"
        return f"; its report: {self._report}"


def summary(error: BaseException) -> str:
    """One line about what ended torchrun."""
    if isinstance(error, ChildFailedError):
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return f"rank {rank} ended with exit code {failure.exitcode}, the message above says why"
        number = signal.Signals(-failure.exitcode)
        return f"rank {rank} ended with signal {number.value} ({number.name}), {CAUSES.get(number, ELSE)}"
    if isinstance(error, SignalException):
        return f"stopped by {error.sigval.name}"
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "EADDRINUSE" in first:
        port = os.environ.get("MASTER_PORT") or _port_of(sys.argv)
        return f"port {port} of this host is in use, perhaps by another run: set MASTER_PORT to a free one"
    return first


def _port_of(argv: list[str]) -> str:
    """The --master_port of a command line; torchrun's default where there is none."""
    for name, value in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, given = name.partition("=")
        if flag in ("--master_port", "--master-port"):
            return given if equals else value
    return "29500"
