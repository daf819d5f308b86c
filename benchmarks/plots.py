"""Draws docs/images/cost.png from the JSON of growth.py and scaling.py.

    python benchmarks/plots.py --growth benchmarks/results/growth_cpu.json --scaling benchmarks/results/scaling_cpu.json

Needs matplotlib (the extra "quickstart").
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

TITLES = {"images": "images in a row", "text": "tokens of text", "layers": "decoder layers", "rows": "rows"}
OUT = Path(__file__).parent.parent / "docs" / "images" / "cost.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--growth", required=True, metavar="JSON")
    parser.add_argument("--scaling", required=True, metavar="JSON")
    parser.add_argument("--out", type=Path, default=OUT, metavar="PNG")
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    growth = json.loads(Path(args.growth).read_text(encoding="utf-8"))
    scaling = json.loads(Path(args.scaling).read_text(encoding="utf-8"))
    figure, axes = pyplot.subplots(1, len(TITLES) + 1, figsize=(13, 2.8), layout="constrained")
    for axis, (curve, title) in zip(axes, TITLES.items(), strict=False):
        points = growth[curve]
        values, seconds = [point["value"] for point in points], [point["seconds"] for point in points]
        # Operations in seconds, at the rate of the largest point: what a cost of operations alone would give.
        rate = points[-1]["flops"] / points[-1]["seconds"]
        axis.plot(values, seconds, "o-", label="measured")
        axis.plot(values, [point["flops"] / rate for point in points], "--", label="operations")
        axis.set(xlabel=title, ylim=(0, None))
    axes[0].set_ylabel("seconds a step")
    axes[0].legend(fontsize=7)
    layouts = [name for name in ("one", "DP", "TP", "PP") if name in scaling]
    ranks = scaling["settings"]["ranks"]
    axes[-1].bar(layouts, [scaling[name]["speedup"] for name in layouts])
    axes[-1].set(xlabel=f"{ranks} ranks", ylabel="speed-up over one", ylim=(0, 1.15 * ranks))
    if "apart" in scaling:
        axes[-1].axhline(scaling["apart"]["speedup"], linestyle="--", color="C1", label="runs of one side by side")
        axes[-1].legend(fontsize=7, loc="upper left")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=80)


if __name__ == "__main__":
    main()
