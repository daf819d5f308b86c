"""How the cost of our training step grows: seconds over images, length, layers, and tokens of a micro-batch.

    python benchmarks/growth.py --out benchmarks/results/growth_cpu.json
    python benchmarks/growth.py --device cuda --size small --bf16 --out benchmarks/results/growth_h200.json

Stage 2 (decoder and projector trained) from llava_shapes.py; one figure changes, the others stay at the base: a row of
one image and 448 tokens of text. Points of a curve take turns, medians over the rounds behind the first. Beside the
seconds stand the operations that trainer/flops.py counts. benchmarks/plots.py draws the curves.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from typing import Any

import torch
from llava_shapes import IMAGE_SIZE, IMAGE_TOKENS, SHAPES, model_json
from own_step import OwnStep
from report import machine, write

from mindspeed_mm.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from mindspeed_mm.data.collate import Collator
from mindspeed_mm.data.sample import Batch, Encoded
from mindspeed_mm.models.media import Media

TRAINED = ("text_decoder", "vision_projector")
TEXT = 448
CURVES = {"images": (0, 1, 2, 4), "text": (128, 256, 512, 1024, 2048), "layers": (1, 2, 4, 8), "rows": (1, 2, 4)}
"""Images in the row, tokens of text, decoder layers, rows of the micro-batch."""


def batch_of(size: str, *, images: int = 1, text: int = TEXT, rows: int = 1) -> Batch:
    """Equal rows of random words, the second half of the text supervised."""
    draw = random.Random(0)
    words = [draw.randrange(10, SHAPES[size].image_token_id) for _ in range(text)]
    ids = [1] + [IMAGE_TOKEN_INDEX] * (IMAGE_TOKENS * images) + words
    labels = [IGNORE_INDEX] * (len(ids) - text // 2) + words[text - text // 2 :]
    pixels = tuple(Media.of_images(torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)) for _ in range(images))
    return Collator(0)([Encoded(f"row {row}", ids, labels, pixels) for row in range(rows)])


def measure(args: argparse.Namespace, model: dict[str, Any], batches: dict[int, Batch]) -> list[dict[str, float]]:
    """A point for each batch, all on one model."""
    from mindspeed_mm.trainer.flops import batch_flops

    flags = "--micro-batch-size 1 --global-batch-size 1"
    step = OwnStep(model, flags, device=args.device, bf16=args.bf16, ranks=1)
    rounds = [{value: step([batch])[0] for value, batch in batches.items()} for _ in range(args.repeats + 1)][1:]
    points = []
    for value, batch in batches.items():
        flops = batch_flops(step.spec, batch)
        seconds = [done[value] for done in rounds]
        points.append(
            {"value": value, "seconds": statistics.median(seconds), "all_seconds": seconds, "flops": flops}
            | {"tokens": batch.tokens}
        )
    step.end()
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--repeats", type=int, default=3, help="rounds after the first")
    parser.add_argument("--curves", choices=CURVES, nargs="+", default=list(CURVES))
    parser.add_argument("--out", metavar="JSON", help="default: stdout")
    args = parser.parse_args()
    settings = vars(args) | machine() | {"threads": torch.get_num_threads()}
    results: dict[str, Any] = {"settings": settings}
    for curve in args.curves:
        model = model_json(args.size, TRAINED, None)
        if curve == "layers":
            results[curve] = []
            for layers in CURVES[curve]:
                model["text_decoder"]["num_layers"] = layers
                (point,) = measure(args, model, {layers: batch_of(args.size)})
                results[curve].append(point)
        else:
            batches = {value: batch_of(args.size, **{curve: value}) for value in CURVES[curve]}
            results[curve] = measure(args, model, batches)
        for point in results[curve]:
            rate = point["flops"] / point["seconds"] / 1e9
            sys.stderr.write(f"{curve} {point['value']}: {point['seconds']:.3f} s, {rate:.1f} GFLOP/s\n")
    write(results, args.out)


if __name__ == "__main__":
    main()
