"""AdamW's step count and the start of its state, which torch and megatron.core keep in ways that do not fit together.

torch makes the state of a parameter at its first step, and counts steps per parameter. megatron.core saves one count,
and only from rank 0, which may train nothing (a pipeline stage that is frozen). So the state is made at once here, and
the count travels in run.json.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron.driver.muon import MuonAdamW


def _adamw(optimizer: MegatronOptimizer) -> Iterator[torch.optim.AdamW]:
    """torch's optimizers inside; the fused ones of Apex and Transformer Engine count in their parameter groups."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.AdamW):
            yield part.optimizer


def begin_state(optimizer: MegatronOptimizer) -> None:
    """Make the moments and the step count of every parameter, so that a checkpoint has the same tensors at any step."""
    for inner in _adamw(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                inner.state[parameter] = _first_state(inner, parameter)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, torch.optim.AdamW):
            part._set_main_param_and_optimizer_states = functools.partial(_set_states, part)
            if not part.optimizer.state:
                part.state_dict = functools.partial(_state_of_nothing, part)
        # megatron.core 0.16 knows a saved group by four keys, which groups with values of their own share. Those that
        # it is given here are this optimizer's own, in its order (optimizer_kinds.complete).
        part._filter_and_reorder_param_groups = _as_they_are


def _as_they_are(_own: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return saved


def _first_state(inner: torch.optim.AdamW, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    if isinstance(inner, MuonAdamW):
        return inner.first_state(parameter)
    moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), dtype=torch.float32), **moments}


def _set_states(part: DistributedOptimizer, parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
    """Load the state of one parameter. megatron.core 0.16.1 asks for torch's step count here but never passes it."""
    group, order = part.model_param_group_index_map[parameter]
    shard = part.optimizer.param_groups[group]["params"][order]
    own = {"step": part.optimizer.state[shard]["step"]}
    DistributedOptimizer._set_main_param_and_optimizer_states(part, parameter, {**tensors, **own})


def _state_of_nothing(part: DistributedOptimizer) -> dict[str, Any]:
    """state_dict of a rank that trains nothing, or has no share of it, where megatron.core looks for one step count."""
    groups = [{**group, "step": 0.0} for group in part.optimizer.state_dict()["param_groups"]]
    state: dict[str, Any] = {"optimizer": {"param_groups": groups}}
    for group in groups:
        del group["params"]
    if part.grad_scaler:
        state["grad_scaler"] = part.grad_scaler.state_dict()
    return state


def step_count(optimizer: MegatronOptimizer) -> int:
    """Updates that this rank's parameters have seen; 0 where it trains none."""
    return max((int(values["step"]) for inner in _adamw(optimizer) for values in inner.state.values()), default=0)


def set_step_count(optimizer: MegatronOptimizer, count: int) -> None:
    """Give every parameter its own count."""
    for inner in _adamw(optimizer):
        for values in inner.state.values():
            values["step"] = torch.tensor(float(count))


def provide_step_count(loaded: dict[str, Any], count: int) -> None:
    """Put the count where MegatronOptimizer.load_state_dict looks for it, if rank 0 had none to save."""
    state = loaded.get("optimizer", loaded).get("state")
    if state is not None:
        state.setdefault("common_step", torch.tensor(float(count)))
