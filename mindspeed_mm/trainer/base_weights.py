"""Which weights a run's adapters are trained on: the hashes that a checkpoint keeps and an adapter's folder names."""

from __future__ import annotations

from typing import Any

from megatron.driver.arguments import DriverArguments
from mindspeed_mm.models.adapters.base_hash import base_hash
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.models.spec import ModelSpec, load_model_spec
from mindspeed_mm.trainer.architecture import starting_checkpoint


def base_hashes(args: DriverArguments, spec: ModelSpec, saved: dict[str, Any]) -> dict[str, str]:
    """Slot -> hash of its base weights, for the parts that have adapters and weights to begin with.

    Args:
        saved: what the checkpoint says that the run begins with (`extra` of its run.json); empty without one.
    """
    start = starting_checkpoint(args)
    if start is not None and (saved.get("base") or _has_adapters(saved)):
        return saved.get("base", {})
    found = {}
    for slot, part in spec.part_specs().items():
        path = part.ckpt_path if start is None else start
        if part.lora is not None and path is not None:
            found[slot] = base_hash(spec.parts()[slot], part, open_source(path))
    return found


def _has_adapters(saved: dict[str, Any]) -> bool:
    model = load_model_spec(saved["model"], context="model in run.json") if "model" in saved else None
    return model is not None and any(part.lora is not None for part in model.part_specs().values())
