"""Whole tensors that come with an adapter (PEFT's modules_to_save): in the place of a built part's, and out again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models.adapters.peft_format import PeftAdapter
from mindspeed_mm.models.adapters.targets import DIALECT, all_sites
from mindspeed_mm.weights.loading import check_finite, global_name, whole_tensors
from mindspeed_mm.weights.rules import Step
from mindspeed_mm.weights.shards import shard
from mindspeed_mm.weights.sources import Source

logger = logging.getLogger(__name__)


class SavedValue:
    """This rank's share of a tensor as an adapter has it, and the parameter whose place it takes."""

    def __init__(self, parameter: torch.nn.Parameter, own: Tensor) -> None:
        """`own`: of the parameter's shape and type. It is not in its place yet."""
        self._parameter, self._other, self.active = parameter, own, False

    def put(self, *, active: bool) -> None:
        """Exchange the adapter's and the base's value, where the other one is in place."""
        if active != self.active:
            other = self._other.to(self._parameter.device)
            self._other, self._parameter.data = self._parameter.data, other
            self.active = active


def values_in(module: torch.nn.Module) -> list[SavedValue]:
    """All of a model or a part."""
    return [value for each in module.modules() for value in getattr(each, "saved_values", ())]


def forget_base(module: torch.nn.Module) -> None:
    """Keep the values that are in place, and no others."""
    for each in module.modules():
        if hasattr(each, "saved_values"):
            del each.saved_values


def attach_saved(
    module: torch.nn.Module,
    part: Any,
    spec: Any,
    adapter: PeftAdapter,
    names: Mapping[str, str],
    source: Source | None,
    *,
    tp_rank: int,
    tp_size: int,
    layer_offset: int = 0,
    allow_nonfinite: bool = False,
) -> None:
    """Put an adapter's whole tensors in the place of a part's own, which `values_in(module)` has from then on.

    Args:
        module, tp_rank, tp_size, layer_offset: as in `lora.attach_lora`.
        names: Hugging Face's name of a tensor in the part -> the adapter's name of it.
        source: the base's weights, where a tensor of ours is made of several; None: they are not at hand.

    Raises:
        WeightError: a tensor has another shape than the base's, or is damaged.
        ConfigError: the base's is stored in 4 or 8 bits, or a part of it alone is given and there is no `source`.
    """
    parameters = {global_name(name, layer_offset): parameter for name, parameter in module.named_parameters()}
    stored = {site.step.target for site in all_sites(part, spec)} if spec.quantize else set()
    rules, left = part.rules[DIALECT], set(names)
    found = []
    for step in rules.steps(spec.geometry):
        given = {name: names[name] for name in step.sources if name in names}
        if step.unused or not given:
            continue
        left -= set(given)
        if step.target in stored:
            raise ConfigError(
                f"{adapter.path}: it comes with {next(iter(given.values()))} as a whole (modules_to_save), which "
                f"quantize {spec.quantize} stores in fewer bits; expected whole weights there. Leave quantize out, or "
                "merge the adapter (mindspeed-mm merge)"
            )
        own = None
        for target in _places(step, rules, spec):
            if target not in parameters:  # on another pipeline stage
                continue
            own = _whole(step, part, spec, adapter, given, source) if own is None else own
            check_finite(own, f"{adapter.path}: {', '.join(given.values())}", allowed=allow_nonfinite)
            local = shard(own, step.rule, tp_rank, tp_size, spec.geometry)
            found.append(_value(parameters[target], local, adapter, next(iter(given.values()))))
    if idle := sorted(left - _tied(rules, spec)):
        logger.info("%s: %d whole tensors that are not used, such as %s", adapter.path, len(idle), names[idle[0]])
    module.saved_values = found
    for value in found:
        value.put(active=True)


def _tied(rules: Any, spec: Any) -> set[str]:
    """The name of a head that repeats the embedding; the last pipeline stage has a copy of its own."""
    return set(rules.tied_sources()[0]) if spec.geometry.tied and rules.tied else set()


def _places(step: Step, rules: Any, spec: Any) -> list[str]:
    """Our names of the tensors that a step makes."""
    copy = spec.geometry.tied and rules.tied is not None and step.target == rules.tied[1]
    return [step.target, rules.tied[0]] if copy else [step.target]


def _whole(
    step: Step, part: Any, spec: Any, adapter: PeftAdapter, given: Mapping[str, str], source: Source | None
) -> Tensor:
    """Our whole tensor of a step; what the adapter does not have of it is the base's."""
    if len(given) == len(step.sources):
        theirs: list[Tensor] = [adapter.tensor(given[name]) for name in step.sources]
    elif source is None:
        raise ConfigError(
            f"{adapter.path}: it comes with {', '.join(given.values())} as a whole (modules_to_save), and this model "
            f"has no weights for the rest of {step.target}; expected all of {', '.join(step.sources)}, or ckpt_path. "
            "Set it"
        )
    else:
        ((_, base),) = whole_tensors(part, spec, source, [step.target])
        theirs = [
            adapter.tensor(given[name]).to(own.dtype) if name in given else own
            for name, own in zip(step.sources, step.rule.to_theirs(base, spec.geometry), strict=True)
        ]
    return step.rule.to_ours(theirs, spec.geometry)


def _value(parameter: torch.nn.Parameter, local: Tensor, adapter: PeftAdapter, name: str) -> SavedValue:
    if local.shape != parameter.shape:
        raise WeightError(
            f"{adapter.path}: {name} makes a tensor of shape {list(local.shape)} on this rank, the base has "
            f"{list(parameter.shape)}; expected equal shapes. Give an adapter of this base model"
        )
    return SavedValue(parameter, local.to(parameter.device, parameter.dtype, copy=True).contiguous())
