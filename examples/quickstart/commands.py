"""Runs the commands that a user would type: shows them, keeps their whole output in a file, shows the gist live."""

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

ITERATION = re.compile(r"iteration +(\d+)/ *(\d+) .*lm loss: (\S+)")
TAIL_LINES = 15
SECONDS_BETWEEN_LINES = 5.0
SAVING_SECONDS = 60.0
"""In which a command that Ctrl-C has reached saves what it has, and ends."""


class StepError(Exception):
    """A step failed; the message is for the user."""


@dataclass(frozen=True)
class Command:
    """Words of a command and the variables in front of them."""

    words: Sequence[str]
    variables: Mapping[str, str]

    def __str__(self) -> str:
        return " ".join(
            [*(f"{name}={shlex.quote(value)}" for name, value in self.variables.items()), shlex.join(self.words)]
        )


def say(text: str = "") -> None:
    """A line for the reader."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Logged(NamedTuple):
    """A training log line; its loss is the mean since the line before."""

    iteration: int
    total: int
    loss: float


def shortened(text: str, root: Path) -> str:
    """Paths inside the checkout as they are written in its root, where the commands run."""
    return text.replace(f"{root}{os.sep}", "")


def iteration_of(line: str) -> Logged | None:
    """What a training log line says; None for any other line."""
    found = ITERATION.search(line)
    return Logged(int(found[1]), int(found[2]), float(found[3])) if found else None


def logged_losses(lines: Sequence[str]) -> dict[int, float]:
    """Loss by iteration of all training log lines."""
    return {facts.iteration: facts.loss for facts in map(iteration_of, lines) if facts is not None}


class Live:
    """Training as one moving line on a terminal, as a line every few seconds elsewhere."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._shown = -SECONDS_BETWEEN_LINES
        self._terminal = sys.stdout.isatty()
        self._open = False

    def show(self, line: str) -> None:
        """Takes each line of output; only training lines are shown."""
        facts = iteration_of(line)
        if facts is None:
            return
        iteration, total, loss = facts
        seconds = time.monotonic() - self._start
        text = f"    iteration {iteration:>5} of {total}   loss {loss:.4f}   {seconds:5.0f} s"
        if self._terminal:
            sys.stdout.write(f"\r{text}")
            sys.stdout.flush()
            self._open = True
        elif seconds - self._shown >= SECONDS_BETWEEN_LINES or iteration == total:
            self._shown = seconds
            say(text)

    def close(self) -> None:
        if self._open:
            say()
            self._open = False


def run(command: Command, root: Path, log: Path, stop_when: Callable[[str], bool] | None = None) -> list[str]:
    """Run a command in `root` and return its output lines, standard output and error together.

    Args:
        log: file that gets the command and its whole output; made anew.
        stop_when: asked for every line; on True the command and all processes it started get SIGKILL.

    Raises:
        StepError: the command failed (its last lines are in the message), or it ended before `stop_when` said so.
    """
    say(f"$ {shortened(str(command), root)}")
    log.parent.mkdir(parents=True, exist_ok=True)
    process = start(command, root)
    lines, stopped, live = [], False, Live()
    try:
        with log.open("w", encoding="utf-8") as stream:
            stream.write(f"$ {command}\n")
            for line in process.stdout:
                stream.write(line)
                lines.append(line.rstrip("\n"))
                live.show(line)
                if stop_when is not None and not stopped and stop_when(line):
                    stopped = True
                    kill_tree(process.pid)
    except KeyboardInterrupt:
        let_end(process)
        raise
    finally:
        live.close()
        kill_tree(process.pid)
        code = process.wait()
    if stopped:
        return lines
    if code != 0:
        tail = "\n".join(f"    {line}" for line in before_launcher_report(lines)[-TAIL_LINES:])
        raise StepError(f"the command above ended with exit code {code}. Its last lines (all are in {log}):\n{tail}")
    if stop_when is not None:
        raise StepError(f"the command above should have been interrupted, but ended by itself; see {log}")
    return lines


def follow(words: Sequence[str]) -> None:
    """Run a command of ours whose output goes where this process's own goes.

    Raises:
        StepError: it failed, and has said why.
    """
    process = subprocess.Popen([sys.executable, "-m", "mindspeed_mm", *words])
    try:
        process.wait()
    except KeyboardInterrupt:
        let_end(process)
        raise
    finally:
        kill_tree(process.pid)
        code = process.wait()
    if code:
        raise StepError(f"{words[0]} ended with exit code {code}; the lines above say why")


def let_end(process: subprocess.Popen) -> None:
    """Wait for a process that Ctrl-C has reached, too, which may be saving. Pressed again it ends the waiting, as it
    ends the saving."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=SAVING_SECONDS)


def start(command: Command, root: Path) -> subprocess.Popen:
    """The running command; StepError where its program does not exist."""
    variables = environment(command.variables)
    program = shutil.which(command.words[0], path=variables["PATH"])
    if program is None:
        raise StepError(f"{command.words[0]} is not on PATH: is the environment of scripts/setup_env.sh in use?")
    return subprocess.Popen(
        [program, *command.words[1:]],
        cwd=root,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def before_launcher_report(lines: Sequence[str]) -> Sequence[str]:
    """The lines that the failed program itself wrote: torchrun adds pages about its workers behind them."""
    first = next(
        (
            number
            for number, line in enumerate(lines)
            if "torch.distributed.elastic" in line or "torch/distributed/elastic" in line
        ),
        len(lines),
    )
    return lines[:first] or lines


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and its descendants: torchrun puts its workers into sessions of their own."""
    try:
        process = psutil.Process(pid)
        family = [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family[:-1], timeout=10)


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with the venv's programs first and the command's variables."""
    programs = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": programs + os.pathsep + os.environ.get("PATH", ""), **variables}


def json_result(lines: Sequence[str]) -> dict:
    """The JSON line that --json prints last.

    Raises:
        StepError: there is none.
    """
    for line in reversed(lines):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
    raise StepError("the command above printed no line of JSON although --json was given")


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
