"""`mindspeed-mm plot`: the curves of several runs in one PNG."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

HELP = "draw the loss, or another metric, of several runs into one PNG"
EXAMPLE = "mindspeed-mm plot save_dir save_dir_finetune --out compared.png"

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's save folder, or its metrics.jsonl")
    parser.add_argument("--out", default="curves.png", metavar="PNG", help="the file to write (default %(default)s)")
    parser.add_argument(
        "--metric", default="loss", metavar="NAME", help="a key of metrics.jsonl, samples/s or tokens/s (default loss)"
    )
    parser.add_argument(
        "--smooth", type=float, default=0.9, metavar="SHARE", help="of the average so far, 0 to below 1 (default 0.9)"
    )


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Draw. Returns the file and the last value of each run for --json."""
    from mindspeed_mm.errors import ConfigError
    from mindspeed_mm.trainer.curves import draw, names_of, read_records, values_of

    if not 0 <= namespace.smooth < 1:
        raise ConfigError(f"--smooth is {namespace.smooth}: expected 0 or more and below 1")
    out = Path(namespace.out)
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out}: expected a name that ends with .png")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.parent} does not exist; make it, or choose another")
    runs = {name: read_records(path) for path, name in zip(namespace.runs, names_of(namespace.runs), strict=True)}
    try:
        draw(out, runs, namespace.metric, namespace.smooth)
    except OSError as error:
        raise ConfigError(
            f"--out {out}: cannot be written ({error.strerror}); choose another name or folder"
        ) from error
    last = {}
    for name, records in runs.items():
        steps, values = values_of(records, namespace.metric)
        last[name] = {"step": steps[-1], namespace.metric: values[-1]} if steps else None
        shown = f", the last {namespace.metric} is {values[-1]:.4g}" if steps else ""
        left_out = len(records) - len(steps)
        more = f", {left_out} more without a finite {namespace.metric}" if left_out else ""
        logger.info("%s: %d steps%s%s", name, len(steps), shown, more)
    logger.info("wrote %s", out)
    return {"file": str(out), "runs": last}
