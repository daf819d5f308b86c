"""Learning rate and weight decay of single parameters, in the form of megatron.core's parameter groups.

A parameter's attribute `optimizer_values` is a dict of `lr` (the highest one of the schedule) or `lr_factor` (its ratio
to the run's), and `weight_decay`; what it lacks is as the run's flags say. The lowest learning rate keeps its ratio to
the highest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
from torch.nn import Parameter

from mindspeed_mm.platform.core_optimizer import grouped_optimizer


def make_optimizer(config: OptimizerConfig, model: Sequence[torch.nn.Module]) -> MegatronOptimizer:
    """megatron.core's optimizer, with what the parameters of all ranks say."""
    held = {_key(parameter) for chunk in model for parameter in chunk.parameters() if parameter.requires_grad}
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, held)
    keys = sorted(set().union(*gathered) - {()})
    return grouped_optimizer(config, model, _key, {key: _group_values(config, dict(key)) for key in keys})


def run_learning_rate(optimizer: MegatronOptimizer) -> float:
    """The present learning rate of the run's own schedule; where all parameters have their own, the first of these."""
    groups = optimizer.param_groups
    return next(
        (group["lr"] for group in groups if group.get("default_config", True)), groups[0]["lr"] if groups else 0.0
    )


def _key(parameter: Parameter) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(getattr(parameter, "optimizer_values", {}).items()))


def _group_values(config: OptimizerConfig, values: dict[str, float]) -> dict[str, float]:
    """The keys of a parameter group that the schedule reads."""
    found = {}
    if "lr" in values:
        found |= {"max_lr": values["lr"], "min_lr": values["lr"] * config.min_lr / config.lr}
    if "lr_factor" in values:
        found |= {"max_lr": values["lr_factor"] * config.lr, "min_lr": values["lr_factor"] * config.min_lr}
    if "weight_decay" in values:
        found |= {"start_wd": values["weight_decay"], "end_wd": values["weight_decay"]}
    return found
