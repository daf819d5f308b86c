"""Training runs of two ranks whose processes are killed or stopped at random moments.

A program of its own: it imports everything once and forks the ranks, so that a start takes a fraction of a second.

    python -m tests.helpers.killed_runs '{"save": ..., "kills": 5, "seed": 1, "signal": 9, "moments": [0.3, 1.5],
        "command": ["tiny", "0.005", "40"] | ["train", flags ...]}'
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

TIMEOUT_MINUTES = 0.15


def main() -> None:
    """Print one JSON line a start: who was killed when, how the others ended and what they said."""
    plan = json.loads(sys.argv[1])
    import torch

    torch.set_num_threads(1)
    from mindspeed_mm.platform import get_platform

    get_platform("cpu")
    from megatron.core.models.gpt import GPTModel  # noqa: F401

    import mindspeed_mm.cli._training  # noqa: F401  before the ranks are forked

    dice = random.Random(plan["seed"])
    for number in range(plan["kills"] + 1):
        victims = [] if number == plan["kills"] else dice.choice(plan.get("victims", [[0], [1], [0, 1]]))
        moment = dice.uniform(*plan["moments"])
        print(json.dumps(one_start(plan, number, victims, moment)), flush=True)


def one_start(plan: dict, number: int, victims: list[int], moment: float) -> dict:
    """Start both ranks, kill the victims at the moment, wait for the others."""
    save, port = plan["save"], _port()
    ranks = [_start(rank, plan, number, port) for rank in range(2)]
    if victims:
        time.sleep(moment)
    for rank in victims:
        os.kill(ranks[rank], plan.get("signal", signal.SIGKILL))
    start = time.monotonic()
    ends = {rank: _end(ranks[rank]) for rank in range(2) if rank not in victims}
    seconds = time.monotonic() - start
    for rank in victims:
        os.kill(ranks[rank], signal.SIGKILL)  # those that were only stopped
        ends[rank] = _end(ranks[rank])
    tracker = Path(save, "latest_checkpointed_iteration.txt")
    return {
        "victims": victims,
        "moment": moment,
        "ends": [ends[rank] for rank in range(2)],
        "seconds": seconds,
        "iteration": int(tracker.read_text()) if tracker.exists() else 0,
        "said": [Path(f"{save}.{number}.{rank}.log").read_text()[-2000:] for rank in range(2)],
    }


def _end(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _start(rank: int, plan: dict, number: int, port: int) -> int:
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
    timeout = ["--preflight-timeout-seconds", "60"]
    if number < plan["kills"]:  # the last start has time, however busy the machine is
        timeout = ["--distributed-timeout-minutes", str(TIMEOUT_MINUTES), "--preflight-timeout-seconds", "20"]
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


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
