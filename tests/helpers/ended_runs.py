"""Commands that are ended in the middle, each rank a process of its own, and what is left of them.

A program of its own: it imports everything once and forks the ranks, so that a start takes a fraction of a second. The
ranks end as real processes do, with everything that the interpreter does at its end.

    python -m tests.helpers.ended_runs FOLDER '[{"cause": "hook", "ranks": 2, "command": ["train", flags ...]}, ...]'
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import psutil

from tests.helpers.killed_runs import _end, free_port

STEP = 2
"""Steps that are done when the cause comes."""

SMALL = 100_000
"""Bytes that a file may have on the disk that is full: a log fits, a checkpoint does not."""


def main() -> None:
    """Print one JSON line a case: exit code, text and remaining processes of each rank, and how long it took."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in a shell's background begin without it
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    import tests.helpers.imported  # noqa: F401  before the ranks are forked

    for number, case in enumerate(cases):
        found = one_case(case, folder / f"case_{number}")
        print(json.dumps(found), flush=True)


def one_case(case: dict, place: Path) -> dict:
    """Start all ranks and wait for them."""
    port = free_port()
    ranks = [_start(rank, case, place, port) for rank in range(case["ranks"])]
    start = time.monotonic()
    ends = [_end(process) for process in ranks]
    return {
        "ends": ends,
        "seconds": round(time.monotonic() - start, 1),
        "said": [Path(f"{place}.{rank}.log").read_text() for rank in range(case["ranks"])],
        "left": [name for process in ranks for name in _session(process)],
    }


def _session(leader: int) -> list[str]:
    """Processes that a rank has left behind. Those that the kernel is just ending get a moment."""
    family = [process for process in psutil.process_iter() if _session_of(process.pid) == leader]
    _, alive = psutil.wait_procs(family, timeout=5)
    for process in alive:
        process.kill()
    return [str(process) for process in alive]


def _session_of(process: int) -> int | None:
    try:
        return os.getsid(process)
    except OSError:
        return None


def _start(rank: int, case: dict, place: Path, port: int) -> int:
    process = os.fork()
    if process:
        return process
    os.setsid()
    log = os.open(f"{place}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if case["ranks"] > 1:
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case["ranks"], "LOCAL_WORLD_SIZE": case["ranks"]}
        where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in where.items()})
    from mindspeed_mm import ending
    from mindspeed_mm.cli.main import main as command

    line = [word.replace("{place}", str(place)) for word in case["command"]]
    if line[0] == "train":
        _arm_training(case["cause"], rank)
    else:
        _arm_generation(case["cause"], rank)
    ending.run_process(functools.partial(command, line))


def _strike(cause: str, rank: int) -> None:
    """What happens to this rank, at the moment."""
    if cause.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[cause])
    elif cause == f"lost {rank}":
        os.kill(os.getpid(), signal.SIGKILL)
    elif cause == "full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, SMALL))


def _arm_training(cause: str, rank: int) -> None:
    from megatron.driver import loop

    step, train = loop.train_step, loop.train

    def train_step(state, *rest):
        if state.iteration == STEP:
            _strike(cause, rank)
            if cause == "not finite":
                for module in state.modules:
                    for parameter in module.parameters():
                        parameter.data.fill_(float("nan"))
        return step(state, *rest)

    def after_step(state):
        if state.iteration == STEP and cause in ("hook", f"hook {rank}"):
            raise RuntimeError("a hook of the user")

    def train_with_hook(*arguments):
        *others, hooks = arguments
        return train(*others, dataclasses.replace(hooks, after_step=after_step))

    loop.train_step = train_step
    if cause.startswith("hook"):
        loop.train = train_with_hook


def _arm_generation(cause: str, rank: int) -> None:
    from mindspeed_mm.generation.engine import GenerationEngine

    step, count = GenerationEngine.step, [0]

    def counted(engine):
        count[0] += 1
        if count[0] == STEP:
            _strike(cause, rank)
        return step(engine)

    GenerationEngine.step = counted


if __name__ == "__main__":
    main()
