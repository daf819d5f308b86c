"""Training runs of two ranks whose processes are killed or stopped at random moments.

A program of its own: it imports everything once and forks the ranks, so that a start takes a fraction of a second.

    python -m tests.helpers.killed_runs '{"save": ..., "kills": 5, "seed": 1, "signal": 9, "moments": [0.3, 1.5],
        "saved": true, "command": ["tiny", "0.005", "40"] | ["train", flags ...]}'

A moment is so many seconds after the start or, with "saved", after the first checkpoint of this start.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import sys
import time
from pathlib import Path

ALLOWED = ((0.15, 20), (1.0, 60), (5.0, 240))
"""(--distributed-timeout-minutes, --preflight-timeout-seconds). On a busy machine a living rank may stand still for
longer than the short ones; such a start (see `judge`) is tried again with the next, no other is."""

LONGEST = 900
"""Seconds after which a start hangs."""


def main() -> None:
    """Print one JSON line a start: who was killed when, how the others ended and what they said."""
    plan = json.loads(sys.argv[1])
    import tests.helpers.imported  # noqa: F401  before the ranks are forked

    dice = random.Random(plan["seed"])
    level = 0
    for number in range(plan["kills"] + 1):
        victims = [] if number == plan["kills"] else dice.choice(plan.get("victims", [[0], [1], [0, 1]]))
        moment = dice.uniform(*plan["moments"])
        while True:
            start = one_start(plan, number, victims, moment, ALLOWED[level])
            start["problem"], busy = judge(start)
            start["spoiled"] = busy and level + 1 < len(ALLOWED)
            print(json.dumps(start), flush=True)
            if not start["spoiled"]:
                break
            level += 1


def judge(start: dict) -> tuple[str | None, bool]:
    """(what a start did otherwise than it should, whether a machine too busy for the time allowed explains it).

    The survivor names the victim and ends by itself, in time. Only two things are laid to the machine: that a living
    rank was given up because it kept silent, and that a survivor that did all it should was late.
    """
    if not start["victims"]:
        return (None if start["ends"] == [0, 0] else f"the ranks ended with {start['ends']}"), False
    if len(start["victims"]) == 2:
        return None, False
    (victim,) = start["victims"]
    end, said = start["ends"][1 - victim], start["said"][1 - victim]
    if end == 0:  # the run was over before
        return None, False
    if end < 0:
        return f"the survivor ended by signal {-end} after {start['seconds']:.0f} s", False
    silent = [f"rank {1 - victim} on {socket.gethostname()} is lost, it gave no sign of life"]
    names = [f"rank {victim} on", f"rank(s) {victim} of 2 did not start"]
    if victim == 0:  # it keeps the store
        names += ["rank 0's host is lost", "rank 0 or its host is lost", "cannot reach rank 0", "rank 0, which keeps"]
    else:
        silent += ["rank 0's host is lost or cannot be reached"]
    if any(words in said for words in silent):
        return f"rank {1 - victim} was given up, which lives", True
    if not any(name in said for name in names):
        return f"the survivor does not name rank {victim}", False
    if start["seconds"] > 60 * start["allowed"][0] + start["allowed"][1]:
        return f"the survivor took {start['seconds']:.0f} s", True
    return None, False


def one_start(plan: dict, number: int, victims: list[int], moment: float, allowed: tuple[float, float]) -> dict:
    """Start both ranks, kill the victims at the moment, wait for the others."""
    save, port = plan["save"], free_port()
    before = _iteration(save)
    ranks = [_start(rank, plan, number, port, allowed) for rank in range(2)]
    if victims:
        while plan.get("saved") and _iteration(save) == before and not any(_has_ended(process) for process in ranks):
            time.sleep(0.01)
        time.sleep(moment)
    for rank in victims:
        os.kill(ranks[rank], plan.get("signal", signal.SIGKILL))
    start = time.monotonic()
    ends = {rank: _end(ranks[rank]) for rank in range(2) if rank not in victims}
    seconds = time.monotonic() - start
    for rank in victims:
        os.kill(ranks[rank], signal.SIGKILL)  # those that were only stopped
        ends[rank] = _end(ranks[rank])
    return {
        "victims": victims,
        "allowed": allowed,
        "moment": moment,
        "ends": [ends[rank] for rank in range(2)],
        "seconds": seconds,
        "iteration": _iteration(save),
        "said": [Path(f"{save}.{number}.{rank}.log").read_text()[-2000:] for rank in range(2)],
    }


def _iteration(save: str) -> int:
    """What the tracker names."""
    tracker = Path(save, "latest_checkpointed_iteration.txt")
    return int(tracker.read_text()) if tracker.exists() else 0


def _has_ended(process: int) -> bool:
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end(process: int) -> int:
    """Exit code of a process; one that hangs is killed, which is its exit code then."""
    handle = os.pidfd_open(process)
    if not select.select([handle], [], [], LONGEST)[0]:
        os.kill(process, signal.SIGKILL)
    os.close(handle)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _start(rank: int, plan: dict, number: int, port: int, allowed: tuple[float, float]) -> int:
    save = plan["save"]
    log = os.open(f"{save}.{number}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    process = os.fork()
    if process:
        os.close(log)
        return process
    os.dup2(log, 1)
    os.dup2(log, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    flags = ["--save", save, "--load", save, "--save-interval", "2", "--keep-last", "2"]
    if number % 2:
        flags.append("--async-save")
    timeout = ["--preflight-timeout-seconds", "240"]
    if number < plan["kills"]:  # the last start has time, however busy the machine is
        timeout = ["--distributed-timeout-minutes", str(allowed[0]), "--preflight-timeout-seconds", str(allowed[1])]
    code = 1
    try:
        code = _run([*plan["command"], *flags, *timeout])
    except Exception as error:  # the text is what the test looks at
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def _run(command: list[str]) -> int:
    """`tiny` is tests.helpers.tiny_training, everything else `mindspeed-mm`."""
    if command[0] != "tiny":
        from mindspeed_mm.cli.main import main

        return main(command)
    from tests.helpers import tiny_training

    sys.argv = command
    tiny_training.main()
    return 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
