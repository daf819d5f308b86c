"""The trained parameters as the optimizer holds them: in float32, and a share of each where ranks share them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor
from torch.nn import Parameter


class HeldParameter(NamedTuple):
    """One trained parameter on this rank."""

    model: Parameter
    """As the model computes with it."""
    main: Tensor
    """What the optimizer moves: float32, of the parameter's shape, or flat where it is a share."""
    share: slice | None
    """Where `main` stands in the flat parameter; None: it is all of it."""


def held_parameters(optimizer: MegatronOptimizer) -> Iterator[HeldParameter]:
    """All of them, in no particular order."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer):
            yield from _shared(part)
        elif part.optimizer is None:  # this rank trains nothing
            continue
        elif isinstance(part, Float16OptimizerWithFloat16Params):
            for halves, copies in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
                yield from (HeldParameter(half, copy, None) for half, copy in zip(halves, copies, strict=True))
            for group in part.fp32_from_fp32_groups:
                yield from (HeldParameter(parameter, parameter, None) for parameter in group)
        else:
            for group in part.optimizer.param_groups:
                yield from (HeldParameter(parameter, parameter, None) for parameter in group["params"])


def _shared(part: DistributedOptimizer) -> Iterator[HeldParameter]:
    for model, (group, order) in getattr(part, "model_param_group_index_map", {}).items():
        main = part.optimizer.param_groups[group]["params"][order]
        share = part._get_model_param_range_map(model)["param"]
        yield HeldParameter(model, main, slice(share.start, share.end))
