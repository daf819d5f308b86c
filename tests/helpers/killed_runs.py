"""Training runs of two ranks whose processes are killed at random moments.

A program of its own: it imports everything once and forks the ranks, so that a start takes a fraction of a second.

    python -m tests.helpers.killed_runs SAVE KILLS SEED STEPS
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

PATIENCE_MINUTES = 0.05


def main() -> None:
    """Print one JSON line a start: who was killed when, how the others ended and what they said."""
    save, kills, seed, steps = sys.argv[1], *map(int, sys.argv[2:5])
    import torch

    torch.set_num_threads(1)
    from mindspeed_mm.platform import get_platform

    get_platform("cpu")
    from megatron.core.models.gpt import GPTModel  # noqa: F401

    import megatron.driver.setup  # noqa: F401  before the ranks are forked

    dice = random.Random(seed)
    for number in range(kills + 1):
        last = number == kills
        ranks = [_start(rank, save, steps, number) for rank in range(2)]
        victims = [] if last else dice.choice([[0], [1], [0, 1]])
        moment = dice.uniform(0.3, 1.5)
        if victims:
            time.sleep(moment)
        for rank in victims:
            os.kill(ranks[rank], signal.SIGKILL)
        start = time.monotonic()
        ends = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks]
        said = [Path(f"{save}.{number}.{rank}.log").read_text() for rank in range(2)]
        tracker = Path(save, "latest_checkpointed_iteration.txt")
        result = {
            "victims": victims,
            "moment": moment,
            "ends": ends,
            "seconds": time.monotonic() - start,
            "iteration": int(tracker.read_text()) if tracker.exists() else 0,
            "said": [text[-600:] for text in said],
        }
        print(json.dumps(result), flush=True)


def _start(rank: int, save: str, steps: int, number: int) -> int:
    port = _port(number) if rank == 0 else _start.port
    _start.port = port
    process = os.fork()
    if process:
        return process
    log = os.open(f"{save}.{number}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    flags = ["--save", save, "--load", save, "--save-interval", "2", "--keep-last", "2"]
    timeout = ["--distributed-timeout-minutes", str(PATIENCE_MINUTES), "--preflight-timeout-seconds", "20"]
    sys.argv = ["tiny_training", "0.005", str(steps), *flags, *timeout]
    from tests.helpers import tiny_training

    code = 1
    try:
        tiny_training.main()
        code = 0
    except Exception as error:  # the text is what the test looks at
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def _port(_number: int) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
