"""What trains is data: which parameters of a part are trained, and with which learning rate and weight decay.

A part's `freeze`, `lr` and `weight_decay` hold for all of it. Its `parameters` are rules over names; the last one that
fits a parameter and says something decides. Names are those of a checkpoint, without the part's own prefix.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from mindspeed_mm.models.adapters.targets import ADAPTER, WEIGHT, all_sites, is_b
from mindspeed_mm.models.part import block_path
from mindspeed_mm.weights.loading import global_name
from mindspeed_mm.weights.rule_names import is_layered


class Setting(NamedTuple):
    """How one parameter is trained; None: as the run's flags say."""

    trained: bool
    lr: float | None
    weight_decay: float | None
    lr_factor: float = 1.0
    """Of the run's learning rate, where `lr` is None (LoRA+, layer_decay)."""
    rows: tuple[int, ...] | None = None
    """The rows that are trained, of all ranks together; None: all."""


_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
HEAD = "output_layer.weight"
BEHIND = ("decoder.final_layernorm.", "output_layer.", "post_layernorm.", "pooling_head.")
"""What stands behind a part's layers; all else that has no layer stands in front of them."""


def setting(spec: Any, name: str) -> Setting:
    """The setting of a parameter by its name in a checkpoint."""
    frozen = spec.frozen(name) or (spec.lora is not None and ADAPTER not in name)
    found = {"freeze": frozen, "lr": spec.lr, "weight_decay": spec.weight_decay}
    ruled, rows = False, None
    for rule in spec.parameters:
        if fnmatch.fnmatchcase(name, rule.names):
            stated = {key: getattr(rule, key) for key in found}
            found |= {key: value for key, value in stated.items() if value is not None}
            ruled = ruled or rule.lr is not None
            rows = rule.rows if rule.freeze is not None else rows
    rows = None if rows is None else tuple(rows)
    found["weight_decay"] = found["weight_decay"] if rows is None else 0.0
    # A rule's learning rate is what it says; the part's and the run's are A's.
    factor = spec.lora.loraplus_lr_ratio if spec.lora is not None and not ruled and is_b(name) else 1.0
    if spec.layer_decay is not None and not ruled:
        factor *= spec.layer_decay ** layers_behind(spec, name)
    if found["lr"] is not None:
        return Setting(not found["freeze"], factor * found["lr"], found["weight_decay"], rows=rows)
    return Setting(not found["freeze"], None, found["weight_decay"], factor, rows)


def layers_behind(spec: Any, name: str) -> int:
    """How many steps of layer_decay a parameter is away from the part's end (BEiT's rule): 0 behind the layers, 1 in
    the last one, and one more than there are layers in front of the first one."""
    if name.startswith(BEHIND):
        return 0
    found, layers = _LAYER.search(name), spec.geometry.num_layers
    return layers - int(found[1]) if found else layers + 1


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
        if own.rows is not None and own.trained:
            _train_rows(parameter, own.rows)


def _train_rows(parameter: torch.nn.Parameter, rows: Iterable[int]) -> None:
    """Give all other rows of a vocabulary, whose ranks have equal shares, gradients of zero."""
    from megatron.core import parallel_state

    first = parallel_state.get_tensor_model_parallel_rank() * len(parameter)
    own = [row - first for row in rows if first <= row < first + len(parameter)]
    chosen = torch.zeros(len(parameter), 1, dtype=torch.bool)
    chosen[own] = True
    parameter.register_hook(lambda gradient: gradient.masked_fill(~chosen.to(gradient.device), 0.0))


def names_of(part: Any, spec: Any) -> Iterator[str]:
    """The names of a part's own parameters."""
    return (step.target for step in part.rules["ours"].steps(spec.geometry) if not step.unused)


class TrainedLinears(NamedTuple):
    """Which linears of a text decoder have gradients of their weights; adapters beside them are left out."""

    layers: bool
    cross: bool
    """Those of its cross-attention to features beside the text."""
    head: bool


def trained_linears(part: Any, spec: Any) -> TrainedLinears:
    """Those of a decoder's part; where rules train some layers alone, all count."""
    if not spec.trains or not spec.parameters:
        own = spec.trains and spec.lora is None
        return TrainedLinears(own, own, own)
    rules, shape = part.rules["ours"], spec.cross_shape
    found = {"layers": False, "cross": False}
    for step in rules.steps(spec.geometry):
        if not step.unused and step.rule.axis is not None and is_layered(step.rule.target):
            kind = "cross" if shape is not None and step.rule.target.startswith(shape.names) else "layers"
            found[kind] = found[kind] or setting(spec, step.target).trained
    head = rules.tied[1] if spec.geometry.tied and rules.tied is not None else HEAD
    return TrainedLinears(**found, head=setting(spec, head).trained)


def problems(parts: dict[str, Any], specs: dict[str, Any]) -> list[str]:
    """What is wrong with the learning rates and rules of a model, one line each, with the JSON path."""
    lines = []
    for slot, spec in specs.items():
        path = block_path(slot)
        if spec.freeze and not spec.trains:
            lines += [
                f"{path}.{key}: found {getattr(spec, key):g} for a part that is frozen; remove it, or set freeze false"
                for key in ("lr", "weight_decay", "layer_decay")
                if getattr(spec, key) is not None
            ]
        if spec.layer_decay is not None and not any(_LAYER.search(name) for name in names_of(parts[slot], spec)):
            lines.append(f"{path}.layer_decay: found {spec.layer_decay:g} for a part without layers; remove it")
        names = list(names_of(parts[slot], spec)) if spec.parameters else []
        for number, rule in enumerate(spec.parameters):
            fits = [name for name in names if fnmatch.fnmatchcase(name, rule.names)]
            if not fits and not (spec.lora is not None and ADAPTER in rule.names):
                near = difflib.get_close_matches(rule.names, names, n=2, cutoff=0.3) or names[:2]
                lines.append(
                    f"{path}.parameters[{number}].names: {rule.names!r} fits no parameter of this part; expected a "
                    f"pattern of names such as {', '.join(near)}. Correct it"
                )
            elif rule.freeze is False and (wrong := _stored(parts[slot], spec, fits)) is not None:
                lines.append(f"{path}.parameters[{number}].names: {wrong}")
            elif rule.rows is not None and (wrong := _wrong_rows(parts[slot], spec, fits, rule.rows)):
                lines.append(f"{path}.parameters[{number}].rows: {wrong}")
            elif fits and rule.lr is not None and not any(setting(spec, name).trained for name in fits):
                lines.append(
                    f"{path}.parameters[{number}].lr: found {rule.lr:g} for parameters that are frozen; remove it, or "
                    "give the rule freeze false"
                )
    return lines


def _stored(part: Any, spec: Any, names: Iterable[str]) -> str | None:
    """What is wrong with a rule that opens weights which are stored in fewer bits; None: nothing."""
    linears = {site.owner + WEIGHT for site in all_sites(part, spec)} if spec.quantize is not None else set()
    found = next((name for name in names if name in linears), None)
    if found is None:
        return None
    return (
        f"found freeze false for {found}, which quantize {spec.quantize} stores and nothing trains; expected names of "
        "other parameters. Narrow names, or remove quantize"
    )


def _wrong_rows(part: Any, spec: Any, names: Iterable[str], rows: Iterable[int]) -> str | None:
    """What is wrong with a rule that trains rows of some parameters; None: nothing."""
    words = {step.target for step in part.rules["ours"].steps(spec.geometry) if step.rule.padded}
    other = next((name for name in names if name not in words), None)
    if other is not None:
        return f"found for {other}; expected {' or '.join(sorted(words)) or 'a part with words'} alone. Narrow names"
    size = spec.geometry.vocab_size
    if max(rows) >= size:
        return f"found {max(rows)}; expected token ids below {size}, the vocabulary. Correct it"
    return None
