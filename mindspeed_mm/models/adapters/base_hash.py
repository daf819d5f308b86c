"""A short name of the weights that an adapter was trained on, so that it is not put on others by mistake.

It is made of some rows of some linears, as all layouts and half precisions of the same weights have them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.adapters.targets import all_sites
from mindspeed_mm.weights.files import read_json_object
from mindspeed_mm.weights.loading import whole_tensors
from mindspeed_mm.weights.sources import Source

FILE = "base_weights.json"
"""In an adapter's folder: slot -> hash of the part that it was trained on."""

QUANTIZED_FROM = "quantized_from"
"""Key of what a checkpoint says of itself: slot -> hash of the weights that were quantised (convert --quantize)."""

LINEARS, ROWS = 4, 64
"""How many linears are looked at, from the first to the last one, and about how many rows of each."""

SMALLEST = 2.0**-13
"""Smaller values count as zero: float16 keeps fewer bits of them than bfloat16."""


def base_hash(part: Any, spec: Any, source: Source) -> str:
    """16 hexadecimal digits of a part's weights; reads LINEARS tensors. Weights that were written in 4 or 8 bits have
    the hash of those that they were made of. Raises WeightError as `check_part` does."""
    recorded = (source.config or {}).get(QUANTIZED_FROM, {}) if source.layout == "checkpoint" else {}
    if part.kind in recorded:
        return recorded[part.kind]
    owners = list(dict.fromkeys(site.step.target for site in all_sites(part, spec)))
    chosen = [owners[round(number * (len(owners) - 1) / (LINEARS - 1))] for number in range(LINEARS)]
    digest = hashlib.sha256()
    for name, weight in whole_tensors(part, spec, source, list(dict.fromkeys(chosen))):
        rows = weight[:: max(1, len(weight) // ROWS)].to(torch.bfloat16)
        rows = rows.masked_fill(rows.abs() < SMALLEST, 0)
        digest.update(f"{name} {list(weight.shape)}".encode())
        digest.update(rows.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def write_base(folder: Path, hashes: Mapping[str, str]) -> Path:
    """Put the hashes by slot into an adapter's folder; returns the file."""
    path = folder / FILE
    path.write_text(json.dumps(dict(hashes), indent=2) + "\n", encoding="utf-8")
    return path


def check_base(folder: Path, slot: str, part: Any, spec: Any, source: Source) -> None:
    """Raise WeightError where an adapter's folder says that it was trained on other weights of a part. A folder that
    says nothing (stock PEFT's) is taken as it is."""
    if not (folder / FILE).is_file():
        return
    recorded = read_json_object(folder / FILE).get(slot)
    if recorded is None:
        return
    found = base_hash(part, spec, source)
    if found != recorded:
        raise WeightError(
            f"{folder}: the adapter was trained on other weights of the {slot}: {FILE} says {recorded}, "
            f"{source.part(slot).path} has {found}. Give the base that it was trained on (adapter_config.json may name "
            f"it). An adapter that was merged into these weights already needs no second merge. Only if they are the "
            f"same weights after all, remove {FILE}"
        )
