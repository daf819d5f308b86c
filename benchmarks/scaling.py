"""Training speed of two ranks on two cores against one rank with one thread: data, tensor and pipeline parallel.

    python benchmarks/scaling.py --out benchmarks/results/scaling_cpu.json

Every layout trains on the same global batch of the same samples ("equal" of training_work.py), one sample a
micro-batch. Layouts take turns, each in processes of its own under torchrun; the first step of each is left out, and
medians are taken over all others. "apart" is what the machine has to give: as many runs of one rank side by side, which
share nothing but its memory (on the CPU only). On GPUs: `--device cuda --size small --bf16`; the vision encoder has 2
heads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llava_shapes import SHAPES, model_json
from report import machine, write

KIND = "equal"
LAYOUTS = {"one": (), "apart": (), "DP": (), "TP": ("tensor",), "PP": ("pipeline",)}
"""Which parallel size takes all ranks; none: the data-parallel one."""


def work_of_rank(args: argparse.Namespace) -> None:
    """One rank of one layout: prints the seconds of each step and the first loss on rank 0. Runs under torchrun."""
    import torch

    if args.device == "cpu":
        torch.set_num_threads(1)
    from own_step import OwnStep
    from training_work import TRAINED, make_work

    ranks = int(os.environ["WORLD_SIZE"])
    sizes = {f"{name}_model_parallel_size": ranks for name in LAYOUTS[args.layout]}
    flags = f"--micro-batch-size 1 --global-batch-size {args.batch}"
    flags += " --overlap-grad-reduce" if args.layout == "DP" and args.overlap else ""
    model = model_json(args.size, TRAINED[KIND], None)
    step = OwnStep(model, flags, device=args.device, bf16=args.bf16, ranks=ranks, **sizes)
    batches = make_work(KIND, args.size, 1, args.batch).ours
    own = batches[step.state.data_parallel_rank :: step.state.data_parallel_size]
    done = [step(own) for _ in range(args.steps + 1)]
    if torch.distributed.get_rank() == 0:
        seconds = [seconds for seconds, _ in done[1:]]
        sys.stdout.write("result " + json.dumps({"seconds": seconds, "loss": done[0][1]}) + "\n")
    step.end()


def run_layout(layout: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each step and the first loss of one layout."""
    if layout == "apart":
        with ThreadPoolExecutor(args.ranks) as pool:
            runs = list(pool.map(lambda _: run_layout("one", args), range(args.ranks)))
        # That many batches were trained in the mean time of a step.
        seconds = [statistics.mean(step) / args.ranks for step in zip(*(run["seconds"] for run in runs), strict=True)]
        return {"seconds": seconds, "loss": runs[0]["loss"]}
    ranks = 1 if layout == "one" else args.ranks
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    flags = ["--layout", layout, "--size", args.size, "--device", args.device]
    flags += ["--batch", str(args.batch), "--steps", str(args.steps)] + ["--bf16"] * args.bf16
    flags += ["--overlap"] * args.overlap
    done = subprocess.run([*command, __file__, *flags], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("result ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{layout} failed:\n{done.stderr}")
    return json.loads(lines[-1].removeprefix("result "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = [size for size, shape in SHAPES.items() if shape.vision_encoder_heads > 1]  # TP divides the heads
    parser.add_argument("--size", choices=sizes, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="samples of a step")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--overlap", action="store_true", help="DP: reduce gradients during the backward pass")
    parser.add_argument("--layout", choices=LAYOUTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", metavar="JSON", help="default: stdout")
    args = parser.parse_args()
    if args.layout:
        work_of_rank(args)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    turns: dict[str, list] = {name: [] for name in LAYOUTS if args.device == "cpu" or name != "apart"}
    place = machine()
    for _ in range(args.turns):
        for name, kept in turns.items():
            kept.append(run_layout(name, args))
    medians = {name: statistics.median(s for turn in kept for s in turn["seconds"]) for name, kept in turns.items()}
    results: dict[str, Any] = {"settings": {key: value for key, value in vars(args).items() if key != "layout"} | place}
    for name, kept in turns.items():
        results[name] = {
            "samples_per_s": args.batch / medians[name],
            "speedup": medians["one"] / medians[name],
            "seconds": [turn["seconds"] for turn in kept],
            "loss": kept[0]["loss"],
        }
        sys.stderr.write(f"{name}: {results[name]['samples_per_s']:.2f} samples/s, {results[name]['speedup']:.2f}x\n")
    write(results, args.out)


if __name__ == "__main__":
    main()
