"""The end of a run, whatever ends it: what the run opened is closed, and the process ends within seconds.

`closing` stands around every command. What starts processes or threads that could outlive an error says `at_end`, and
processes that work for another one say `belong_to_parent`. A rank stops when its torchrun is killed. A process that
still does not end is made to.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import logging
import multiprocessing
import os
import select
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

logger = logging.getLogger(__name__)

GRACE = 20.0
"""Seconds in which a process ends by itself; then it is ended, and every thread's place is shown."""

COMPLETE_GRACE = 120.0
"""The same for a run that is complete, which must not end as one that failed: on a busy machine the interpreter's own
end takes long."""

EXIT_SIGNAL = 128
"""A process that was told to stop by signal n ends with this plus n, as a shell counts it."""

TORCHRUN = "TORCHELASTIC_RUN_ID"
"""A variable that torchrun sets for its ranks."""

END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What a terminal sends at Ctrl-C, a supervisor to end a process, and a terminal that is closed."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_open: list[Callable[[], None]] = []
_depth = 0
_is_own_process = _is_limited = False


class Stopped(Exception):
    """A run saved what it had and stopped, because a signal told it to. `result` is what --json prints."""

    def __init__(self, text: str, number: int, result: dict[str, Any]) -> None:
        super().__init__(text)
        self.exit_code = EXIT_SIGNAL + number
        self.result = result


class Terminated(BaseException):
    """SIGTERM or SIGHUP came, and the work under way does nothing else about it. No Exception, since it is nobody's to
    catch."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = EXIT_SIGNAL + number


def heard(*numbers: int) -> list[int]:
    """The signals among these that a process listens to: not SIGHUP where nohup has it ignored."""
    return [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


def at_end(close: Callable[[], None]) -> None:
    """Have `close` called when the run around this ends. Outside of a run it is the caller's affair, as ever."""
    if _depth:
        _open.append(close)


@contextlib.contextmanager
def closing() -> Iterator[None]:
    """Around a run: on every way out, calls what `at_end` was told inside, the last first.

    What goes wrong in closing is logged where an error is on its way already, and raised where none is.
    """
    global _depth
    before, _depth = len(_open), _depth + 1
    try:
        yield
    except BaseException:
        _limit()
        _close_from(before, logger.error)
        raise
    else:
        problems: list[str] = []
        _close_from(before, lambda _text, problem: problems.append(str(problem)))
        if problems:
            raise RuntimeError("; ".join(problems))
    finally:
        _depth -= 1


def _close_from(before: int, tell: Callable[[str, Exception], None]) -> None:
    while len(_open) > before:
        close = _open.pop()
        try:
            close()
        except (OSError, RuntimeError, ValueError) as problem:
            tell("in closing: %s", problem)


def run_process(main: Callable[[], int]) -> NoReturn:
    """Run `main` as the work of this process, and end the process with the code that it returns."""
    global _is_own_process
    _is_own_process = True
    _open_streams()
    _stop_with_torchrun()
    _end_in_order()
    code = main()
    _limit(GRACE if code else COMPLETE_GRACE)
    _leave_groups()
    _leave(code)


def _open_streams() -> None:
    """Have something behind stdin, stdout and stderr where the process was started without (`>&-`). The next file that
    is opened, a checkpoint, would be in their place otherwise, and get what a library prints."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != number:
                os.dup2(nothing, number)
                os.close(nothing)
            os.set_inheritable(number, True)  # or this would befall the processes that it starts
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))


def nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has gone. What was not written yet then goes nowhere, so that the end of
    the process does not stumble over it."""
    asked = select.poll()
    asked.register(1)
    if not any(event & select.POLLERR for _, event in asked.poll(0)):
        return False
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.close(nothing)
    return True


def _stop_with_torchrun() -> None:
    """Have a rank be sent SIGTERM when its torchrun is killed, as torchrun does when it is told to stop. It would go on
    without anybody to end it, and hold its device."""
    if TORCHRUN in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end_in_order() -> None:
    """Have SIGTERM, and SIGHUP of a terminal that is closed, raise Terminated, so that `closing` closes what the run
    opened and `main` says what happened; a second one ends the process at once. Ranks of a larger run end at once
    anyway, as they may stand in a collective, and torchrun says it."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return
    owner = os.getpid()

    def end(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != owner:  # a fork, which has inherited this
            os.kill(os.getpid(), number)
        raise Terminated(number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, end)


def _limit(seconds: float = GRACE) -> None:
    """From now on the process has so many seconds. Their thread needs no lock of Python's: nothing can hold it."""
    global _is_limited
    if _is_own_process and not _is_limited:
        _is_limited = True
        faulthandler.dump_traceback_later(seconds, exit=True)


def _leave_groups() -> None:
    """Process groups that a command joined end before the interpreter does, whose end they would disturb."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _leave(code: int) -> NoReturn:
    """End the process in the order of the interpreter, without its last act: to take every module and object apart.

    That takes as long as a fifth of a short run, many times more on a busy machine, and nothing is left for it to do.
    Python ends the children that multiprocessing forks in the same way.
    """
    if code != EXIT_SIGNAL + signal.SIGINT:  # nobody waits for a thread after Ctrl-C twice; after one, saves are done
        threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads any more, or the disk is full: the interpreter says so, with a code of its own
        sys.exit(code)
    os._exit(code)


def belong_to_parent() -> None:
    """For a process that was forked to work for another one: end with it, and hold none of its connections.

    A killed parent closes its connections at once, and its peers see that, only if no child holds them open. The parent
    must have forked from a thread that lives as long as the work.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it ended before that was said
        os._exit(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        handle = int(name)
        with contextlib.suppress(OSError):  # the listing's own is closed already
            if handle > 2 and stat.S_ISSOCK(os.fstat(handle).st_mode):
                os.dup2(nothing, handle, inheritable=False)  # not closed: the number must not be given out again
    os.close(nothing)
