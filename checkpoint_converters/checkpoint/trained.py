"""What a run has trained, as one file in the form of MiniGPT-4's checkpoint_N.pth: {"model": {name: tensor}}.

The original keeps there what has gradients: the linear (`llama_proj`), what else of the bridge was trained, and
MiniGPT-v2's adapters under the names that the peft library gives them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint_converters.checkpoint.adapters import adapters_of_run
from checkpoint_converters.checkpoint.source import open_training_checkpoint
from checkpoint_converters.write import beside, check_target
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.families.minigpt4 import MINIGPT4, NAME
from mindspeed_mm.models.part import part_of, written_prefix
from mindspeed_mm.models.spec import ModelSpec, load_model_spec
from mindspeed_mm.models.trainable import setting
from mindspeed_mm.weights.adapter_names import written_name
from mindspeed_mm.weights.loading import check_finite
from mindspeed_mm.weights.sources import Source

TRAINED = f"{NAME}-trained"
"""Name of the layout."""


def export_trained(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
) -> list[Path]:
    """Write the trained tensors of a training checkpoint of a MiniGPT-4; returns the file.

    Args:
        source: a save folder or one iteration's folder.
        target: the file, such as checkpoint_3.pth.
        dtype: type to store; None keeps each tensor's own.
        overwrite: replace an earlier file.
        allow_nonfinite: write NaN or Inf, which are else refused.

    Raises WeightError for a path that is no such checkpoint, or one in which nothing was trained.
    """
    source, target = Path(source), Path(target)
    opened = open_training_checkpoint(source)
    model = None if opened is None else opened.config["model"]
    if model is None or model.get("model_id") != NAME:
        found = "no training checkpoint" if model is None else f"one of model_id {model.get('model_id', 'llava')}"
        raise WeightError(f"{source}: found {found}; expected a training checkpoint of model_id {NAME}. Correct it")
    spec = load_model_spec(model, context=f"{source}: model in run.json")
    check_target(target, overwrite=overwrite)
    tensors = {}
    for name, tensor in _trained(source, opened, spec):
        check_finite(tensor, f"{source}: {name}", allowed=allow_nonfinite)
        tensors[name] = tensor.to(dtype or tensor.dtype).contiguous().clone()
    if not tensors:
        raise WeightError(
            f"{source}: found nothing that was trained; expected some. Give the checkpoint of another run"
        )
    with beside(target) as temporary:
        torch.save({"model": tensors}, temporary)
    return [target]


def _trained(source: Path, opened: Source, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """(the original's name, value) of all that has gradients."""
    for slot, own in spec.part_specs().items():
        if own.lora is None:
            yield from _own(opened, slot, own)
            continue
        if own.lora.use_dora or own.lora.use_rslora:
            raise WeightError(
                f"{source}: the {slot} was trained with DoRA or rsLoRA, for which the original has no names; expected "
                "plain LoRA. Give --to peft"
            )
        for module, pair in adapters_of_run(source, spec, slot).items():
            yield written_name(MINIGPT4.written[slot], module, "A"), pair.a
            yield written_name(MINIGPT4.written[slot], module, "B"), pair.b


def _own(opened: Source, slot: str, own: Any) -> Iterator[tuple[str, Tensor]]:
    part, held = part_of(slot, own), opened.part(slot)
    prefix = written_prefix(MINIGPT4, part)
    for step in part.rules[MINIGPT4.dialects[slot]].steps(own.geometry):
        if step.target in held.names and setting(own, step.target).trained:
            values = step.rule.to_theirs(held.get(step.target), own.geometry)
            yield from zip((prefix + name for name in step.sources), values, strict=True)
