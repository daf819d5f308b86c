"""SAVE/metrics.jsonl: one record a step. Needs neither torch nor megatron.core."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


def cut_records(path: Path, iteration: int) -> None:
    """Drop the records after `iteration`, and all from one on that a killed run left unfinished."""
    if not path.exists():
        return
    kept, last = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            logger.warning("%s: the records after iteration %d are damaged and dropped", path, last)
            break
        if not line.endswith("\n") or record["iteration"] > iteration:
            break
        kept.append(line)
        last = record["iteration"]
    aside = path.with_name(path.name + ".new")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, path)
