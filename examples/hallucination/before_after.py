"""POPE before and after: several models on POPE's questions, and on a benchmark of general abilities, in one command.

    python examples/hallucination/before_after.py --pope POPE --image-root val2014 --out before_after \
        --point before llava-1.5-7b-hf --point after llava-1.5-7b-hf adapter \
        --general mmbench_dev_en MMBench_DEV_EN.tsv

A point is a name, a model in any layout (a training checkpoint, too) and perhaps an adapter in PEFT's format. Each is
evaluated by `mindspeed-mm evaluate`, which keeps answers: the same command goes on where it was. Writes into OUT
points.json, before_after.png (F1, yes-ratio and recall of the first and the last point in each set) and trade_off.png
(F1 and yes-ratio of all points against the general score).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  the backend must be chosen first
from matplotlib.axes import Axes  # noqa: E402

POPE = "pope"
MEAN = "mean_of_three"
SETS = ("random", "popular", "adversarial")
RATES = ("accuracy", "precision", "recall", "f1", "yes_ratio")
TITLES = {"f1": "F1", "yes_ratio": "yes-ratio", "recall": "recall"}
BEFORE, AFTER, GUIDE = "#2166ac", "#e08214", "#999999"
SAME_RECALL = 1e-9
INTERRUPTED = 130
"""Exit code of a command after Ctrl-C."""
ENDING_SECONDS = 20.0
"""In which ranks that Ctrl-C has reached end by themselves."""


class MeasureError(Exception):
    """An evaluation failed; the message is for the user."""


@dataclass(frozen=True)
class Model:
    """What is measured."""

    name: str
    path: str
    adapter: str | None = None


@dataclass(frozen=True)
class Point:
    """What was measured: rates of POPE by set (strict scoring), and the general score."""

    name: str
    pope: dict[str, dict[str, float]]
    general: float | None


@dataclass(frozen=True)
class Benchmarks:
    """Where the questions are, and how they are asked."""

    pope: str
    image_root: str | None
    general: tuple[str, str] | None
    """Name and file."""
    flags: tuple[str, ...] = ()
    """Further flags of `mindspeed-mm evaluate`."""
    processes: int = 1


def measure(models: Sequence[Model], benchmarks: Benchmarks, out: Path) -> list[Point]:
    """Evaluate the models in their order. Raises MeasureError."""
    out.mkdir(parents=True, exist_ok=True)
    points = []
    for model in models:
        root = ("--image-root", benchmarks.image_root) if benchmarks.image_root else ()
        report = _evaluated(model, POPE, benchmarks.pope, root, benchmarks, out)
        table = report["scores"]["strict"]["table"]
        sets = [name for name in (*SETS, MEAN) if name in table]
        general = None
        if benchmarks.general is not None:
            general = _evaluated(model, *benchmarks.general, (), benchmarks, out)["accuracy"]
        points.append(Point(model.name, {name: {rate: table[name][rate] for rate in RATES} for name in sets}, general))
    return points


def _evaluated(
    model: Model, benchmark: str, table: str, more: Sequence[str], benchmarks: Benchmarks, out: Path
) -> dict:
    """The report of one model on one benchmark."""
    words = ["evaluate", "--model", model.path, "--evaluation-model", model.name, "--dataset-path", table, *more]
    words += ["--adapter", model.adapter] if model.adapter else []
    words += ["--evaluation-dataset", benchmark, "--result-output-path", str(out / "evaluation"), "--json"]
    printed = _printed([*words, *benchmarks.flags], benchmarks.processes)
    files = json.loads(printed.splitlines()[-1])["files"]
    return json.loads(Path(files["report"]).read_text(encoding="utf-8"))


def _printed(words: list[str], processes: int) -> str:
    """Standard output of a command of ours: in this process, which saves its start, or on several by torchrun."""
    if processes > 1:
        launcher = ["torchrun", "--nproc_per_node", str(processes), "--logs-specs", "mindspeed_mm"]
        process = subprocess.Popen([*launcher, "-m", "mindspeed_mm", *words], stdout=subprocess.PIPE, text=True)
        try:
            printed, _ = process.communicate()
        except KeyboardInterrupt:  # which has reached it, too
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=ENDING_SECONDS)
            raise
        finally:
            process.kill()
        code = process.wait()
    else:
        from mindspeed_mm.cli.main import main as command

        with contextlib.redirect_stdout(io.StringIO()) as kept:
            code = command(words)
        printed = kept.getvalue()
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise MeasureError(f"mindspeed-mm {' '.join(words)} ended with exit code {code}; the lines above say why")
    return printed


def warnings(points: Sequence[Point]) -> list[str]:
    """What speaks against the numbers: POPE's sets ask the same yes-questions, so that their recalls must be equal."""
    told = []
    for point in points:
        recalls = {name: point.pope[name]["recall"] for name in SETS if name in point.pope}
        if recalls and max(recalls.values()) - min(recalls.values()) > SAME_RECALL:
            shown = ", ".join(f"{name} {recall:.4f}" for name, recall in recalls.items())
            told.append(
                f"{point.name}: recall differs between the sets ({shown}); they must ask the same yes-questions"
            )
    return told


def table_text(points: Sequence[Point]) -> str:
    """All numbers, in per cent."""
    lines = [f"{'point':<14}{'set':<15}" + "".join(f"{rate:>11}" for rate in RATES) + f"{'general':>11}"]
    for point in points:
        for number, (name, rates) in enumerate(point.pope.items()):
            general = f"{100 * point.general:11.2f}" if number == 0 and point.general is not None else ""
            values = "".join(f"{100 * rates[rate]:11.2f}" for rate in RATES)
            lines.append(f"{point.name if number == 0 else '':<14}{name:<15}{values}{general}")
    return "\n".join(lines)


def plot_before_after(path: Path, first: Point, last: Point) -> None:
    """F1, yes-ratio and recall of two points, set by set."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), constrained_layout=True, sharey=True)
    names = [name for name in SETS if name in first.pope and name in last.pope] or list(first.pope)
    for axis, rate in zip(axes, ("f1", "yes_ratio", "recall"), strict=True):
        for shift, point, colour in ((-0.2, first, BEFORE), (0.2, last, AFTER)):
            values = [point.pope[name][rate] for name in names]
            bars = axis.bar(
                [place + shift for place in range(len(names))], values, 0.38, color=colour, label=point.name
            )
            axis.bar_label(bars, fmt="%.3f", fontsize=8)
        if rate == "yes_ratio":
            axis.axhline(0.5, color=GUIDE, linestyle=":", label="half of the right answers are yes")
        axis.set_xticks(range(len(names)), names)
        axis.set(title=TITLES[rate], ylim=(0, 1.08))
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_trade_off(path: Path, points: Sequence[Point]) -> None:
    """Two panels: mean F1 and mean yes-ratio of each point against its general score."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    for axis, rate in zip(axes, ("f1", "yes_ratio"), strict=True):
        _path_of_points(axis, points, rate)
    axes[1].axhline(0.5, color=GUIDE, linestyle=":")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _path_of_points(axis: Axes, points: Sequence[Point], rate: str) -> None:
    scores = [point.general for point in points]
    values = [headline(point)[rate] for point in points]
    axis.plot(scores, values, color=GUIDE, linewidth=1, zorder=1)
    colours = [BEFORE, *[AFTER] * (len(points) - 1)]
    axis.scatter(scores, values, c=colours, zorder=2)
    for number, (point, score, value) in enumerate(zip(points, scores, values, strict=True)):
        shift = (6, -12 if number % 2 else 5)  # names of points that nearly coincide stay readable
        axis.annotate(point.name, (score, value), textcoords="offset points", xytext=shift, fontsize=9)
    axis.set(xlabel="general score", ylabel=f"POPE {TITLES[rate]}")
    axis.margins(0.15)
    axis.grid(True, alpha=0.2)


def headline(point: Point) -> dict[str, float]:
    """The mean of the sets, or the only set."""
    return point.pope.get(MEAN) or next(iter(point.pope.values()))


def report(points: Sequence[Point], out: Path) -> list[Path]:
    """Write points.json and the plots; returns their paths. Without general scores there is no trade-off to plot."""
    files = [out / "points.json", out / "before_after.png"]
    files[0].write_text(json.dumps([asdict(point) for point in points], indent=2) + "\n", encoding="utf-8")
    plot_before_after(files[1], points[0], points[-1])
    if all(point.general is not None for point in points):
        files.append(out / "trade_off.png")
        plot_trade_off(files[-1], points)
    return files


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="before_after.py", description="POPE and a general benchmark for several models", allow_abbrev=False
    )
    parser.add_argument(
        *("--point",),
        nargs="+",
        action="append",
        required=True,
        metavar="NAME",
        help="NAME MODEL [ADAPTER]; repeatable",
    )
    parser.add_argument("--pope", required=True, metavar="PATH", help="POPE's folder of three files, or its TSV")
    parser.add_argument("--image-root", metavar="DIR", help="folder of COCO's val2014 images")
    parser.add_argument("--general", nargs=2, metavar=("NAME", "FILE"), help="benchmark of general abilities")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="ranks of each evaluation (default 1)")
    parser.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help="of an answer (default 16)")
    parser.add_argument("--out", required=True, metavar="DIR")
    options = parser.parse_args(argv)
    if any(len(point) not in (2, 3) for point in options.point):
        parser.error("--point takes a name, a model and perhaps an adapter")
    if len({point[0] for point in options.point}) < len(options.point):
        parser.error("two points have one name; give each its own")
    return options


def main(argv: list[str] | None = None) -> int:
    """0 on success, 1 with a message otherwise, 130 when interrupted; prints the table."""
    options = parse(argv)
    out = Path(options.out)
    flags = ("--batch-size", str(options.batch_size), "--max-new-tokens", str(options.max_new_tokens))
    general = tuple(options.general) if options.general else None
    benchmarks = Benchmarks(options.pope, options.image_root, general, flags, options.processes)
    try:
        points = measure([Model(*point) for point in options.point], benchmarks, out)
    except MeasureError as error:
        sys.stderr.write(f"before_after.py: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("before_after.py: interrupted; the same command goes on where it was\n")
        return INTERRUPTED
    sys.stdout.write(f"{table_text(points)}\n")
    sys.stderr.writelines(f"warning: {text}\n" for text in warnings(points))
    sys.stdout.writelines(f"  {path}\n" for path in report(points, out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
