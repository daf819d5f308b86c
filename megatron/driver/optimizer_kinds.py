"""Optimizer state that one kind of optimizer saved, for another kind to load.

With and without --use-distributed-optimizer megatron.core saves the same moments under the same names, each of them a
whole tensor. Two things differ: the name of the float32 copy of a parameter, and the settings around the tensors.
"""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.optimizer import MegatronOptimizer

COPY_OF_DISTRIBUTED = "optimizer.state.param."
COPY_OF_OTHERS = "optimizer.state.fp32_param."


def ask_other_kind(sharded: dict[str, Any], *, saved_distributed: bool, full_precision: bool) -> None:
    """Change the names that a sharded optimizer state asks for, in place, to those that the other kind gave.

    Args:
        sharded: what this run's optimizer wants to load.
        saved_distributed: whether the distributed optimizer saved it.
        full_precision: no --bf16 or --fp16: then only the distributed optimizer keeps a copy, and the parameters
            themselves take its place.
    """
    for item in nested_values(sharded):
        if not isinstance(item, ShardedBase):
            continue
        if saved_distributed and item.key.startswith(COPY_OF_OTHERS):
            item.key = COPY_OF_DISTRIBUTED + item.key.removeprefix(COPY_OF_OTHERS)
        elif not saved_distributed and item.key.startswith(COPY_OF_DISTRIBUTED):
            item.key = ("" if full_precision else COPY_OF_OTHERS) + item.key.removeprefix(COPY_OF_DISTRIBUTED)


def complete(loaded: dict[str, Any], optimizer: MegatronOptimizer, step: int) -> dict[str, Any]:
    """What `optimizer.load_state_dict` expects: loaded tensors of either kind, and this optimizer's own settings.

    Rank 0 alone saves settings, of whatever it trains; all of them follow from the flags and the schedule.
    """
    own = optimizer.state_dict()
    state = dict(loaded)
    if "param_groups" in own:  # plain float32: no level of its own for the inner optimizer
        return {"state": loaded["state"], "param_groups": own["param_groups"]}
    groups = [{**group, "step": float(step)} for group in own["optimizer"]["param_groups"]]
    state["optimizer"] = {**loaded.get("optimizer", {}), "param_groups": groups}
    return state
