"""Curves of runs from their metrics.jsonl: loss_curve.png of each run, and several runs in one image."""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.driver.records import METRICS_FILE
from mindspeed_mm.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

CURVE_FILE = "loss_curve.png"
SMOOTHING = 0.9
"""Share of the average so far in the next value of a smoothed curve."""
LOG_RATIO = 20.0
"""From this ratio of the largest to the smallest value on, the axis is logarithmic."""
PER_SECOND = {"samples/s": "samples", "tokens/s": "tokens"}
"""Metrics that follow from a record: this key, divided by the seconds of the step."""


def read_records(run: str | Path) -> list[dict[str, Any]]:
    """The records of a save folder or a metrics.jsonl, one a step; a last line that was cut off is left out.

    Raises:
        DataError: there is no such file, it holds no step, or a line before the last is damaged.
    """
    path = Path(run)
    path = path / METRICS_FILE if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected a run's save folder, or its {METRICS_FILE}. Correct the path")
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number} is damaged: {error}. Expected the {METRICS_FILE} of a run"
            ) from error
        if not isinstance(records[-1], dict) or type(records[-1].get("iteration")) is not int:
            raise DataError(f"{path}, line {number} has no iteration. Expected the {METRICS_FILE} of a run")
    if not records:
        raise DataError(f"{path}: no step is recorded yet; expected a run that has done one")
    return records


def names_of(runs: Sequence[str | Path]) -> list[str]:
    """A name for each run: its folder's, with as many folders above it as tell the runs apart.

    Raises:
        ConfigError: a run is given twice.
    """
    folders = [Path(run).resolve() for run in runs]
    folders = [folder.parent if folder.name == METRICS_FILE else folder for folder in folders]
    for number, folder in enumerate(folders):
        if folder in folders[:number]:
            raise ConfigError(f"the run {folder} is given twice: leave one out")
    depth = 1
    while len({folder.parts[-depth:] for folder in folders}) < len(folders):
        depth += 1
    return ["/".join(folder.parts[-depth:]) for folder in folders]


def values_of(
    records: Sequence[Mapping[str, Any]], metric: str, run: str | None = None
) -> tuple[list[int], list[float]]:
    """(steps, values) of a metric, without the steps that have none: a skipped step has no gradient norm, one that
    overflowed no finite loss. `run` names it in messages.

    Raises:
        ConfigError: the records have no such metric; names those that there are.
        DataError: a value is no number.
    """
    source = PER_SECOND.get(metric, metric)
    known = list(dict.fromkeys(key for record in records for key in record))
    known += [name for name, key in PER_SECOND.items() if {key, "seconds"} <= set(known)]
    where = "" if run is None else f"{run}: "
    if metric not in known:
        near = difflib.get_close_matches(metric, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{where}--metric {metric}: expected one of {', '.join(known)}{hint}")
    found = []
    for record in records:
        value, seconds = record.get(source), record.get("seconds") if metric in PER_SECOND else 1.0
        for each in (value, seconds):
            if each is not None and not isinstance(each, int | float):
                raise DataError(f"{where}step {record['iteration']} has {metric} {each!r:.80}; expected a number")
        if value is not None and seconds and math.isfinite(value / seconds):
            found.append((record["iteration"], value / seconds))
    return [step for step, _ in found], [float(value) for _, value in found]


def smoothed(values: Sequence[float], weight: float = SMOOTHING) -> list[float]:
    """Exponential moving average, corrected for its start; `weight` is that of the average so far."""
    result, total, share = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        share = weight * share + (1 - weight)
        result.append(total / share)
    return result


def draw(
    path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]], metric: str = "loss", weight: float = SMOOTHING
) -> None:
    """Write a PNG with the curve of each run: faint as recorded, strong smoothed.

    Raises:
        ConfigError, DataError: as values_of.
    """
    from matplotlib.figure import Figure

    curves = {name: values_of(records, metric, name if len(runs) > 1 else None) for name, records in runs.items()}
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.add_subplot()
    for number, (name, (steps, values)) in enumerate(curves.items()):
        colour = f"C{number % 10}"
        axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axis.plot(steps, smoothed(values, weight), color=colour, linewidth=1.8, label=_label(name))
    drawn = [value for _, values in curves.values() for value in values]
    if drawn and min(drawn) > 0 and max(drawn) > LOG_RATIO * min(drawn):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="step", ylabel="loss per supervised token" if metric == "loss" else metric)
    axis.grid(True, alpha=0.2)
    axis.legend()
    aside = path.with_name(path.name + ".new")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            figure.savefig(aside, dpi=110, format="png")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    if any("missing from font" in str(each.message) for each in told):
        logger.warning("the font of %s lacks characters of a run's name: they are drawn as boxes", path.name)


def _label(name: str) -> str:
    """A name as matplotlib shows it: not as a formula, and not left out of the legend for an underscore in front."""
    return f" {name}".replace("$", r"\$") if name.startswith("_") else name.replace("$", r"\$")


def leave_loss_curve(save: str | Path) -> Path | None:
    """Draw SAVE/loss_curve.png. Returns its path, None where no step is recorded or it cannot be written (told)."""
    folder = Path(save)
    if not (folder / METRICS_FILE).exists():  # training did not begin
        return None
    try:
        records = read_records(folder)
        draw(folder / CURVE_FILE, {folder.resolve().name: records})
    except (ConfigError, DataError, OSError) as problem:
        logger.warning("%s is not drawn: %s", folder / CURVE_FILE, problem)
        return None
    return folder / CURVE_FILE
