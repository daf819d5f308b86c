"""Does a lever of the training step cost accuracy? The quickstart's model, seed by seed, with levers taken back.

    python benchmarks/lever_accuracy.py --seeds 10 --out benchmarks/results/lever_accuracy.json

Each run has the steps of examples/quickstart (FULL): untrained weights of its seed, stage 1, stage 2, 360 held-out
questions; one process of one thread, no interruption. Results are written after every run, and a file that is there
is gone on with. The figure of a variant is its mean accuracy; the difference to all levers is taken seed by seed, with
the 95 % interval of Student's t. bf16 and fp32 are settings of the run, so they may be compared as well.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from levers import ALL, arithmetic
from report import machine, write
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
NONE = "no lever"
VARIANTS = (ALL, NONE, "chosen products", "fused RMSNorm", "fused SwiGLU", "fused rotation")
PRECISIONS = ("fp32", "bf16")


def command(variant: str, words: list[str]) -> int:
    """A command of the suite in this process, with a lever (or all of them) taken back."""
    from mindspeed_mm.cli.main import main as suite

    with contextlib.ExitStack() as stack:
        for name, without in arithmetic().items():
            if variant in (name, NONE):
                stack.enter_context(without())
        return suite(words)


def suite(variant: str, words: list[str | Path]) -> str:
    """Standard output of a command in a process of its own."""
    process = subprocess.run(
        [sys.executable, __file__, "--command", variant, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise RuntimeError(f"{words} ended with {process.returncode}: {process.stderr[-2000:]}")
    return process.stdout


def train_words(settings: Any, inputs: Path, folder: Path, stage: int, precision: str) -> list[str | Path]:
    """The launcher's flags and the quickstart's (examples/quickstart/steps.py, training_words)."""
    steps, lr = (
        (settings.stage1_steps, settings.stage1_lr) if stage == 1 else (settings.stage2_steps, settings.stage2_lr)
    )
    data = inputs / "configs" / ("data_pretrain.json" if stage == 1 else "data_finetune.json")
    return [
        *("train", "--mm-model", inputs / "configs" / "model.json", "--mm-data", data),
        *("--micro-batch-size", settings.global_batch_size, "--global-batch-size", settings.global_batch_size),
        *("--train-iters", steps, "--lr", lr, "--lr-decay-style", "cosine"),
        *("--lr-warmup-fraction", settings.warmup_fraction, "--weight-decay", 0, "--clip-grad", 1),
        *("--adam-beta1", 0.9, "--adam-beta2", settings.adam_beta2, "--seed", settings.seed),
        *("--num-workers", 0, "--save", folder / f"stage{stage}", "--save-interval", steps),
        *(("--pretrained-checkpoint", folder / "stage1") if stage == 2 else ()),
        *(("--bf16",) if precision == "bf16" else ()),
    ]


class Prepared:
    """Data, untrained weights and configs of each seed: made once, and read by every run of the seed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lock = threading.Lock()

    def of_seed(self, seed: int) -> tuple[Any, Path]:
        """The quickstart's settings with this seed, and the folder of its inputs."""
        from examples.quickstart.configs import write_configs
        from examples.quickstart.make_data import make_data
        from examples.quickstart.make_models import make_models
        from examples.quickstart.settings import FULL

        settings, folder = dataclasses.replace(FULL, seed=seed), self.folder / f"seed{seed}"
        with self.lock:
            if not (folder / "configs").is_dir():  # which are made last
                data, models, converted = folder / "data", folder / "models", folder / "converted"
                make_data(data, settings.questions_per_digit)
                sizes = make_models(models, data, seed)
                for part in ("clip", "vicuna"):
                    suite(ALL, ["convert", models / part, converted, "--to", "mindspeed-mm"])
                write_configs(folder / "configs", data, models, converted, sizes["vocabulary"])
        return settings, folder


def trained(seed: int, variant: str, precision: str, prepared: Prepared) -> dict[str, Any]:
    """Accuracy, and the mean loss of the last 50 steps, of one run."""
    from examples.quickstart.results import read_metrics

    settings, inputs = prepared.of_seed(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for stage in (1, 2):
            suite(variant, train_words(settings, inputs, folder, stage, precision))
        table = ["--dataset-path", inputs / "data" / "digits_mcq.tsv", "--evaluation-dataset", "digits_mcq"]
        output = suite(
            ALL,
            [
                *("evaluate", "--load", folder / "stage2", *table, "--evaluation-model", "quickstart"),
                *("--result-output-path", folder / "evaluation", "--batch-size", 32, "--max-new-tokens", 8, "--json"),
            ],
        )
        result = json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("{")))
        losses = [row["loss"] for row in read_metrics(folder / "stage2" / "metrics.jsonl")]
    return {
        "seed": seed,
        "variant": variant,
        "precision": precision,
        "accuracy": result["accuracy"],
        "questions": result["n"],
        "last_loss": statistics.fmean(losses[-50:]),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each precision and variant the mean accuracy, and the mean difference to all levers with its 95 % interval."""
    found: dict[str, Any] = {}
    for precision in PRECISIONS:
        by_variant = {
            variant: {
                run["seed"]: run["accuracy"]
                for run in runs
                if (run["variant"], run["precision"]) == (variant, precision)
            }
            for variant in VARIANTS
        }
        for variant, accuracies in by_variant.items():
            if not accuracies:
                continue
            one = {"seeds": len(accuracies), "accuracy": statistics.fmean(accuracies.values())}
            shared = sorted(accuracies.keys() & by_variant[ALL].keys())
            if variant != ALL and len(shared) > 1:
                differences = [by_variant[ALL][seed] - accuracies[seed] for seed in shared]
                half = stats.t.ppf(0.975, len(shared) - 1) * statistics.stdev(differences) / math.sqrt(len(shared))
                mean = statistics.fmean(differences)
                one["all levers minus this"] = {"mean": mean, "interval": [mean - half, mean + half]}
            found[f"{variant}, {precision}"] = one
    return found


def main() -> None:
    if sys.argv[1:2] == ["--command"]:
        sys.exit(command(sys.argv[2], sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="seeds 1 to this")
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=VARIANTS, help="what is taken back")
    parser.add_argument("--precisions", choices=PRECISIONS, nargs="+", default=PRECISIONS)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", metavar="JSON", help="default: stdout")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    results: dict[str, Any] = {"settings": vars(args) | machine(), "runs": []}
    if args.out and Path(args.out).is_file():
        results["runs"] = json.loads(Path(args.out).read_text(encoding="utf-8"))["runs"]
    there = {(run["seed"], run["variant"], run["precision"]) for run in results["runs"]}
    wanted = [
        (seed, variant, precision)
        for precision in args.precisions
        for seed in range(1, args.seeds + 1)
        for variant in args.variants
        if (seed, variant, precision) not in there
    ]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(args.processes) as pool:
        prepared = Prepared(Path(name))
        for run in pool.map(lambda one: trained(*one, prepared), wanted):
            results["runs"].append(run)
            results["summary"] = summary(results["runs"])
            sys.stderr.write(f"{run}\n")
            if args.out:
                write(results, args.out)
    if not args.out:
        write(results, None)


if __name__ == "__main__":
    main()
