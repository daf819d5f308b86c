"""What trains is data: which parameters of a part are trained, and with which learning rate and weight decay.

A part's `freeze`, `lr` and `weight_decay` hold for all of it. Its `parameters` are rules over names; the last one that
fits a parameter and says something decides. Names are those of a checkpoint, without the part's own prefix.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from mindspeed_mm.models.adapters.targets import ADAPTER, is_b
from mindspeed_mm.weights.loading import global_name


class Setting(NamedTuple):
    """How one parameter is trained; None: as the run's flags say."""

    trained: bool
    lr: float | None
    weight_decay: float | None
    lr_factor: float = 1.0
    """Of the run's learning rate, where `lr` is None (LoRA+)."""


def setting(spec: Any, name: str) -> Setting:
    """The setting of a parameter by its name in a checkpoint."""
    frozen = spec.frozen(name) or (spec.lora is not None and ADAPTER not in name)
    found = {"freeze": frozen, "lr": spec.lr, "weight_decay": spec.weight_decay}
    ruled = False
    for rule in spec.parameters:
        if fnmatch.fnmatchcase(name, rule.names):
            stated = {key: getattr(rule, key) for key in found}
            found |= {key: value for key, value in stated.items() if value is not None}
            ruled = ruled or rule.lr is not None
    # A rule's learning rate is what it says; the part's and the run's are A's.
    factor = spec.lora.loraplus_lr_ratio if spec.lora is not None and not ruled and is_b(name) else 1.0
    if found["lr"] is not None:
        return Setting(not found["freeze"], factor * found["lr"], found["weight_decay"])
    return Setting(not found["freeze"], None, found["weight_decay"], factor)


def mark(module: torch.nn.Module, spec: Any, layer_offset: int = 0) -> None:
    """Set requires_grad of a built part's parameters, and where they have values of their own the attribute
    `optimizer_values`, which the driver reads."""
    for name, parameter in module.named_parameters():
        own = setting(spec, global_name(name, layer_offset))
        parameter.requires_grad_(own.trained and parameter.is_floating_point())
        values = {"lr": own.lr, "weight_decay": own.weight_decay}
        parameter.optimizer_values = {key: value for key, value in values.items() if value is not None}
        if own.lr_factor != 1.0:
            parameter.optimizer_values["lr_factor"] = own.lr_factor


def names_of(part: Any, spec: Any) -> Iterator[str]:
    """The names of a part's own parameters."""
    return (step.target for step in part.rules["ours"].steps(spec.geometry) if not step.unused)


def problems(parts: dict[str, Any], specs: dict[str, Any]) -> list[str]:
    """What is wrong with the learning rates and rules of a model, one line each, with the JSON path."""
    lines = []
    for slot, spec in specs.items():
        path = slot if slot == "text_decoder" else f"image_encoder.{slot}"
        if spec.freeze and not spec.trains:
            lines += [
                f"{path}.{key}: found {getattr(spec, key):g} for a part that is frozen; remove it, or set freeze false"
                for key in ("lr", "weight_decay")
                if getattr(spec, key) is not None
            ]
        names = list(names_of(parts[slot], spec)) if spec.parameters else []
        for number, rule in enumerate(spec.parameters):
            fits = [name for name in names if fnmatch.fnmatchcase(name, rule.names)]
            if not fits and not (spec.lora is not None and ADAPTER in rule.names):
                near = difflib.get_close_matches(rule.names, names, n=2, cutoff=0.3) or names[:2]
                lines.append(
                    f"{path}.parameters[{number}].names: {rule.names!r} fits no parameter of this part; expected a "
                    f"pattern of names such as {', '.join(near)}. Correct it"
                )
            elif fits and rule.lr is not None and not any(setting(spec, name).trained for name in fits):
                lines.append(
                    f"{path}.parameters[{number}].lr: found {rule.lr:g} for parameters that are frozen; remove it, or "
                    "give the rule freeze false"
                )
    return lines
