"""Fine-tuning: samples/s and peak memory of full training, LoRA and QLoRA against transformers and PEFT, side by side.

    python benchmarks/finetune.py --threads 1 --out benchmarks/results/finetune_cpu.json
    python benchmarks/finetune.py --device cuda --size 7b --bf16 --batch 16 --recompute --mode full lora

Work, sides and measurement are those of train.py; LoRA is rank 16 on every linear of the decoder, with the projector
trained beside it; QLoRA stores these linears in NF4 with double quantisation, on the other side with bitsandbytes. The
goals are LoRA at 1.5 times the speed on mixed lengths, in 0.6 times the memory.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from typing import Any

import torch
from llava_shapes import SHAPES, save_model
from report import machine, write
from train import measure
from training_sides import TrainedJob
from training_work import KINDS

MODES = ("full", "lora", "qlora")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=[name for name in SHAPES if SHAPES[name].ffn % 64 == 0], default="blocks")
    parser.add_argument("--mode", choices=MODES, nargs="+", default=MODES)
    parser.add_argument("--kind", choices=KINDS, default="mixed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--batch", type=int, default=8, help="samples a step")
    parser.add_argument("--steps", type=int, default=2, help="steps of a round")
    parser.add_argument("--repeats", type=int, default=4, help="rounds after the first")
    parser.add_argument("--recompute", action="store_true", help="recompute every decoder layer on both sides")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", metavar="JSON", help="default: stdout")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.size == "7b" and "qlora" in args.mode:
        raise SystemExit("bitsandbytes stores weights of a folder alone: leave qlora out of --mode at --size 7b")
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    results: dict[str, Any] = {"settings": vars(args) | machine() | {"device": device}}
    with tempfile.TemporaryDirectory() as folder:
        weights = folder if args.size != "7b" else None
        if weights:
            save_model(args.size, weights)
        for mode in args.mode:
            job = TrainedJob(
                *(args.kind, args.size, args.device, args.bf16, args.batch, args.steps, args.threads, weights),
                *(args.recompute, mode),
            )
            found = results[mode] = measure(job, args.repeats)
            ours, theirs = found["ours"], found["transformers"]
            sys.stderr.write(
                f"{mode}: {ours['samples_per_s']:.2f} samples/s, transformers {theirs['samples_per_s']:.2f}: "
                f"{found['speedup']:.2f}x; peak {ours['peak_mib']:.0f} MiB, {theirs['peak_mib']:.0f}: "
                f"{found['memory_ratio']:.2f}x\n"
            )
    write(results, args.out)


if __name__ == "__main__":
    main()
