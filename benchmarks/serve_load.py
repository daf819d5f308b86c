"""Many clients at once on a controller with two workers, some of them rude, one worker killed and started again.

    python benchmarks/serve_load.py --clients 200 --requests 2000 --rounds 3 --out serve_load.json

Random weights. In each round a third of the way one worker is killed, and it is started again a third later. Answers
are compared with the model's own, errors must have the protocol's form (rude_clients.py). Every round asks the same of
the same processes: after the first one their caches are full, so memory that still grows is lost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

import mindspeed_mm as mm

sys.path.insert(0, str(Path(__file__).parent))
from generate import save_model  # noqa: E402
from rude_clients import RudeClients, ServingProcesses  # noqa: E402
from serve import NAME, bodies, save_companions  # noqa: E402


def measure(folder: str, arguments: argparse.Namespace) -> dict:
    """The figures of all rounds."""
    asked = bodies(arguments.questions, "tiny", arguments.new_tokens, arguments.seed)
    wanted, rounds = expected(folder, asked), []
    words = ["--model", folder, "--served-model-name", NAME, "--device", "cpu", "--queue", str(arguments.clients)]
    with contextlib.ExitStack() as stack:
        cluster = ServingProcesses(stack, *words)
        before = cluster.memory()
        for number in range(arguments.rounds):
            course = RudeClients(
                cluster.controller.address,
                asked,
                wanted,
                clients=arguments.clients,
                requests=arguments.requests,
                seed=arguments.seed + number,
            )
            seconds = course.run({1 / 3: cluster.kill, 2 / 3: cluster.start_again})
            cluster.until_there(2)
            figures = {"seconds": seconds, "requests_per_second": course.ended / seconds}
            figures |= {"kinds": dict(course.kinds), "faults": course.faults, "memory_mib": cluster.memory()}
            rounds.append(figures)
            print(json.dumps(figures), flush=True)
        health = cluster.health()
    return {"memory_mib_before": before, "rounds": rounds, "health_at_the_end": health}


def expected(folder: str, asked: list[dict]) -> list[str]:
    """The texts of the model itself, asked one by one."""
    from mindspeed_mm.serving.conversation import generation_request
    from mindspeed_mm.serving.limits import ServingLimits
    from mindspeed_mm.serving.protocol import ChatRequest

    engine, found = mm.load(folder, device="cpu").engine(), []
    for number, body in enumerate(asked):
        messages = ChatRequest(**body).messages
        request = generation_request(str(number), messages, ServingLimits(), after_image="\n")
        options = {"max_new_tokens": body["max_tokens"], "min_new_tokens": body["min_new_tokens"]}
        found.append(engine.submit(request, options).wait().text)
    return found


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--requests", type=int, default=2000, help="of a round")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--questions", type=int, default=64, help="different ones")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write a JSON file")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        save_model("tiny", torch.float32, folder)
        save_companions("tiny", folder)
        found = measure(folder, arguments)
    found |= {"load": os.getloadavg()[0], "arguments": vars(arguments)}
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(found, indent=1))
    return 1 if any(each["faults"] for each in found["rounds"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
