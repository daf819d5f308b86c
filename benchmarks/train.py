"""Training speed and memory: this suite's step and transformers' with torch's AdamW, same weights, same samples.

    python benchmarks/train.py --out benchmarks/results/train_cpu.json
    python benchmarks/train.py --device cuda --size 7b --bf16 --batch 16 --out benchmarks/results/train_h200.json

Each side has a process of its own. A round of one is followed by one of the other, so that both see the same load of
the machine; the first round warms up, then medians are taken. On an accelerator one side runs after the other, because
both do not fit. What is measured and at which lengths: training_work.py. Memory is the peak during the steps above what
the process had before the model was built (CPU: resident memory), or the allocator's peak (CUDA).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from typing import Any

import torch
from llava_shapes import SHAPES, model_json, save_model
from report import best_product_rate, machine, write
from training_sides import Side, TrainedJob
from training_work import KINDS, TRAINED, make_work

NAMES = ("transformers", "ours")
LOSS_TOLERANCE = 2e-3
"""Relative difference of the losses up to which both sides do the same work (bf16: times 10)."""


def work_facts(job: TrainedJob) -> dict[str, float]:
    """Real tokens, padding and model operations of a round."""
    from mindspeed_mm.models.spec import load_model_spec
    from mindspeed_mm.trainer.flops import batch_flops

    work = make_work(job.kind, job.size, job.batch, job.steps)
    spec = load_model_spec(model_json(job.size, TRAINED[job.kind], None))
    tokens = sum(batch.tokens for batch in work.padded)
    return {
        "samples": sum(len(batch.sample_ids) for batch in work.padded),
        "tokens": tokens,
        "supervised": [batch.supervised for batch in work.padded],
        "supervised_ours": [batch.supervised for batch in work.ours],
        "padding_share": 1 - tokens / sum(batch.input_ids.numel() for batch in work.padded),
        "padding_share_ours": 1 - tokens / sum(batch.input_ids.numel() for batch in work.ours),
        "model_flops": sum(batch_flops(spec, batch) for batch in work.padded),
    }


def rounds_of(job: TrainedJob, repeats: int) -> tuple[dict[str, list], dict[str, float]]:
    """All rounds of both sides without the first, and their peaks of memory."""
    rounds: dict[str, list] = {name: [] for name in NAMES}
    peaks = {}
    if job.device != "cpu":
        for name in NAMES:
            side = Side(name, job)
            rounds[name] = [side.ask("round") for _ in range(repeats + 1)][1:]
            peaks[name] = side.ask("memory")
            side.end()
        return rounds, peaks
    sides = {name: Side(name, job) for name in NAMES}
    for _ in range(repeats + 1):
        for name, side in sides.items():
            rounds[name].append(side.ask("round"))
    for name, side in sides.items():
        peaks[name] = side.ask("memory")
        side.end()
    return {name: kept[1:] for name, kept in rounds.items()}, peaks


def mean_loss(steps: list[tuple[float, float]], supervised: list[int]) -> float:
    """Of all supervised tokens of a round."""
    return sum(loss * count for (_, loss), count in zip(steps, supervised, strict=True)) / sum(supervised)


def product_rate(job: TrainedJob) -> float:
    """FLOP/s of the machine's best kernel at the decoder's largest linear layer."""
    shape = SHAPES[job.size]
    torch.set_num_threads(job.threads)
    return best_product_rate(torch.bfloat16 if job.bf16 else torch.float32, 2048, shape.hidden, 2 * shape.ffn)


def measure(job: TrainedJob, repeats: int) -> dict[str, Any]:
    """Medians of one kind of work."""
    facts = work_facts(job)
    before = product_rate(job) if job.device == "cpu" else 0.0
    rounds, peaks = rounds_of(job, repeats)
    result: dict[str, Any] = {"work": facts}
    seconds = {name: [sum(s for s, _ in steps) for steps in kept] for name, kept in rounds.items()}
    for name in NAMES:
        typical = statistics.median(seconds[name])
        counts = facts["supervised_ours" if name == "ours" else "supervised"]
        result[name] = {
            "samples_per_s": facts["samples"] / typical,
            "tokens_per_s": facts["tokens"] / typical,
            "model_tflops_per_s": facts["model_flops"] / typical / 1e12,
            "peak_mib": peaks[name],
            "loss": mean_loss(rounds[name][0], counts),
            "seconds": seconds[name],
        }
    ratios = [theirs / ours for theirs, ours in zip(seconds["transformers"], seconds["ours"], strict=True)]
    result["speedup"] = statistics.median(seconds["transformers"]) / statistics.median(seconds["ours"])
    result["speedup_range"] = [min(ratios), max(ratios)]
    if job.device == "cpu":
        best = max(before, product_rate(job))  # before and behind the rounds: other work may have disturbed one
        result["best_product_tflops_per_s"] = best / 1e12
        result["share_of_best_product"] = result["ours"]["model_tflops_per_s"] * 1e12 / best
    result["memory_ratio"] = peaks["ours"] / peaks["transformers"]
    difference = abs(result["ours"]["loss"] / result["transformers"]["loss"] - 1)
    if job.weights and difference > LOSS_TOLERANCE * (10 if job.bf16 else 1):
        raise ValueError(f"{job.kind}: the losses differ by {difference:.1e}: the sides do not do the same work")
    return result


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="small")
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--batch", type=int, help="samples a step; default 4, mixed 8")
    parser.add_argument("--steps", type=int, default=2, help="steps of a round")
    parser.add_argument("--repeats", type=int, default=4, help="rounds after the first")
    parser.add_argument("--recompute", action="store_true", help="recompute every decoder layer on both sides")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", metavar="JSON", help="default: stdout")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    results: dict[str, Any] = {"settings": vars(args) | machine() | {"device": device}}
    with tempfile.TemporaryDirectory() as folder:
        weights = folder if args.size != "7b" else None
        if weights:
            save_model(args.size, weights)
        for kind in args.kind:
            batch = args.batch or (8 if kind == "mixed" else 4)
            job = TrainedJob(
                kind, args.size, args.device, args.bf16, batch, args.steps, args.threads, weights, args.recompute
            )
            found = results[kind] = measure(job, args.repeats)
            ours, theirs = found["ours"], found["transformers"]
            sys.stderr.write(
                f"{kind}: {ours['tokens_per_s']:.0f} tokens/s, transformers {theirs['tokens_per_s']:.0f}: "
                f"{found['speedup']:.2f}x; peak {ours['peak_mib']:.0f} MiB, {theirs['peak_mib']:.0f}: "
                f"{found['memory_ratio']:.2f}x"
                + (f"; {found['share_of_best_product']:.0%} of the best product" if args.device == "cpu" else "")
                + "\n"
            )
    write(results, args.out)


if __name__ == "__main__":
    main()
