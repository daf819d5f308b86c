"""Parameter groups with values of their own, by what each version of megatron.core offers for them.

0.16 takes `config_overrides` and reads all values in its schedule. Older versions group by weight decay alone, and
their schedule reads no weight decay of a group: both are replaced here, for an optimizer that is made and its schedule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core import optimizer as core
from megatron.core import package_info, parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

from mindspeed_mm.platform.core_versions import takes

Values = Mapping[str, float]
"""Keys of a parameter group: max_lr, min_lr, start_wd, end_wd."""


def grouped_optimizer(
    config: core.OptimizerConfig,
    model: Sequence[nn.Module],
    key_of: Callable[[nn.Parameter], Hashable],
    values: Mapping[Hashable, Values],
) -> core.MegatronOptimizer:
    """megatron.core's optimizer, in which the parameters of some keys have values of their own.

    Args:
        key_of: the key of a parameter; one that is not in `values` is trained as the config says.
        values: of each key that a parameter of any rank has, in the same order on all ranks.
    """
    if takes(core.get_megatron_optimizer, "config_overrides"):
        return core.get_megatron_optimizer(config, model, config_overrides=_overrides(config, key_of, values))
    with _grouping(config, key_of, values):
        return core.get_megatron_optimizer(config, model)


def sharded_state(
    optimizer: core.MegatronOptimizer, tensors: dict[str, Any], metadata: dict[str, Any], *, is_loading: bool = False
) -> dict[str, Any]:
    """The optimizer's state, laid out beside the model's sharded `tensors` as `metadata` says.

    0.12 has no such argument: its one layout is the first that 0.13 has.
    """
    asked = {"metadata": metadata} if takes(core.optimizer.FP32Optimizer.sharded_state_dict, "metadata") else {}
    return optimizer.sharded_state_dict(tensors, is_loading=is_loading, **asked)


def finalize_gradients(model: Sequence[nn.Module], num_tokens: torch.Tensor | None = None, **options: Any) -> None:
    """megatron.core's finalize_model_grads, for losses that count the tokens of one context-parallel rank.

    0.12 adds up tokens over data-parallel ranks alone: each counted those of the whole sequence.
    """
    if num_tokens is not None and package_info.MINOR < 13:
        torch.distributed.all_reduce(num_tokens, group=parallel_state.get_context_parallel_group())
    finalize_model_grads(model, num_tokens, **options)


def _overrides(
    config: core.OptimizerConfig, key_of: Callable[[nn.Parameter], Hashable], values: Mapping[Hashable, Values]
) -> dict[Any, Any] | None:
    """megatron.core's `config_overrides`; None where there is nothing to say."""
    if not values:
        return None
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

    overrides = core.get_standard_config_overrides(config)
    for key, own in values.items():
        matches = ParamPredicate(str(key), lambda parameter, key=key: key_of(parameter) == key)
        overrides[ParamKey(predicate=matches)] = dict(own)
    return overrides


@contextlib.contextmanager
def _grouping(
    config: core.OptimizerConfig, key_of: Callable[[nn.Parameter], Hashable], values: Mapping[Hashable, Values]
) -> Iterator[None]:
    """megatron.core before 0.16 finds these groups in place of its own."""

    def groups(model: Sequence[nn.Module], *_args: Any, **_options: Any) -> list[dict[str, Any]]:
        return _groups(config, model, key_of, values)

    own = core._get_param_groups
    core._get_param_groups = groups
    try:
        yield
    finally:
        core._get_param_groups = own


def _groups(
    config: core.OptimizerConfig,
    model: Sequence[nn.Module],
    key_of: Callable[[nn.Parameter], Hashable],
    values: Mapping[Hashable, Values],
) -> list[dict[str, Any]]:
    """The same groups in the same order on every rank, as in 0.16, also where a rank has no parameter of one. Biases
    and parameters of one dimension have no weight decay."""
    found: dict[tuple[Hashable, float], list[nn.Parameter]] = {
        (key, decay): [] for key in (None, *values) for decay in (1.0, 0.0)
    }
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad:
                key = key_of(parameter)
                decay = 0.0 if name.endswith(".bias") or parameter.dim() == 1 else 1.0
                found[key if key in values else None, decay].append(parameter)
    return [
        {
            "params": parameters,
            "wd_mult": decay,
            "lr_mult": 1.0,
            "is_expert_parallel": False,
            "is_decoupled_lr": False,
            "default_config": not any("lr" in name for name in values.get(key, ())),
            "max_lr": config.lr,
            "min_lr": config.min_lr,
            **values.get(key, {}),
        }
        for (key, decay), parameters in found.items()
    ]


class _GroupedScheduler(OptimizerParamScheduler):
    """The schedule of megatron.core before 0.16, with the weight decay of a group."""

    def step(self, increment: int) -> None:
        """See OptimizerParamScheduler."""
        super().step(increment)
        for group in self.optimizer.param_groups:
            if "start_wd" in group:
                group["weight_decay"] = group["start_wd"] * group["wd_mult"]


Scheduler = OptimizerParamScheduler if takes(OptimizerParamScheduler.get_wd, "param_group") else _GroupedScheduler
"""The schedule that reads the values of `grouped_optimizer`."""
