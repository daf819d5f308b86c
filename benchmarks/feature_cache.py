"""What a second epoch gains from --feature-cache: seconds a step of `mindspeed-mm train` with and without, by epoch.

    python benchmarks/feature_cache.py --out benchmarks/results/feature_cache_cpu.json

Stage 1 (projector trained) of a model of llava_shapes.py on photo-like JPEGs of COCO's size, read without workers, so
that decoding counts. Runs with and without the cache take turns; medians over the steps of an epoch behind the first
step. Beside the seconds stand those of them that passed in waiting for data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from data import photo
from llava_shapes import SHAPES, model_json
from report import machine, write
from startup import ANSWER, QUESTION, make_files

BATCH = 4


def run(folder: Path, size: str, name: str, steps: int, cache: Path | None) -> list[dict[str, Any]]:
    """What the log says of each step of two epochs."""
    model = folder / "mm_model_stage1.json"
    model.write_text(json.dumps(model_json(size, ("vision_projector",), str(folder / "model"))))
    flags = f"--device cpu --micro-batch-size {BATCH} --global-batch-size {BATCH} --seq-length 2048 --num-workers 0"
    flags += f" --train-iters {2 * steps} --lr 1e-4 --lr-decay-style constant --log-interval 1"
    files = ["--mm-model", str(model), "--mm-data", str(folder / "mm_data.json"), "--save", str(folder / name)]
    cached = ["--feature-cache", str(cache)] if cache else []
    command = [sys.executable, "-m", "mindspeed_mm", "train", *files, *flags.split(), *cached]
    subprocess.run(command, check=True, capture_output=True)
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def epochs(runs: list[list[dict[str, Any]]], steps: int) -> dict[str, Any]:
    """Medians of the steps of both epochs over all runs, and every step's seconds."""
    found: dict[str, Any] = {}
    for epoch, chosen in (("first", slice(1, steps)), ("second", slice(steps, None))):
        lines = [line for run in runs for line in run[chosen]]
        found[f"{epoch}_epoch_s"] = statistics.median(line["seconds"] for line in lines)
        found[f"{epoch}_epoch_data_s"] = statistics.median(line["data_seconds"] for line in lines)
    return found | {"seconds": [[line["seconds"] for line in run] for run in runs]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="small")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--out", metavar="JSON", help="default: stdout")
    args = parser.parse_args()
    steps = args.images // BATCH
    kept: dict[str, list[list[dict[str, Any]]]] = {"without": [], "with": []}
    settings = vars(args) | machine()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        make_files(folder, args.size)
        turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
        records = []
        for number in range(args.images):
            (folder / f"{number}.jpg").write_bytes(photo(number))
            records.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
        (folder / "data.json").write_text(json.dumps(records))
        for turn in range(args.turns):
            kept["without"].append(run(folder, args.size, f"without{turn}", steps, None))
            kept["with"].append(run(folder, args.size, f"with{turn}", steps, folder / f"cache{turn}"))
    results: dict[str, Any] = {"settings": settings}
    for name, runs in kept.items():
        results[name] = epochs(runs, steps)
        first, second = results[name]["first_epoch_s"], results[name]["second_epoch_s"]
        sys.stderr.write(f"{name} the cache: {first:.3f} s a step in the first epoch, {second:.3f} s in the second\n")
    write(results, args.out)


if __name__ == "__main__":
    main()
