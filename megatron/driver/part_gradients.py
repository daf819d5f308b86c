"""Gradient norms of a model's parts, out of the gradients that the optimizer is about to take.

A model whose module has `parts()` (name -> module) is divided so. The squares of the norms add up to the square of the
whole norm, which the optimizer computes. They travel in the reduction that the loop makes in any case.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import MegatronModule, param_is_not_shared
from torch.nn import Parameter

OTHER = "other"
"""What is trained outside of all parts."""


class PartGradients:
    """Which gradients this rank counts for which part, so that each value is counted once in the world."""

    def __init__(self, modules: Sequence[MegatronModule], optimizer: MegatronOptimizer) -> None:
        """`modules`: the bare chunks of this stage. Collective: the ranks agree on the parts that are trained."""
        trained = _trained_by_part(modules)
        gathered: list[dict[str, None]] = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, dict.fromkeys(trained))
        self.names = list(dict.fromkeys(itertools.chain.from_iterable(gathered)))
        """The parts of all ranks that train something, alike on every rank."""
        shares = _shares(optimizer)
        self._counted = [
            [
                (parameter, shares and shares[parameter])
                for parameter in trained.get(name, ())
                if _counts(parameter, shares)
            ]
            for name in self.names
        ]

    def squares(self, loss_scale: torch.Tensor) -> list[torch.Tensor]:
        """Squared norm of this rank's share of each part, float32 scalars on the device, in the order of `names`. Sums
        over the world are the parts' squared norms.

        Args:
            loss_scale: what the gradients are multiplied by, a float32 tensor of one value.
        """
        return [self._square(counted, loss_scale) for counted in self._counted]

    @staticmethod
    def _square(counted: list[tuple[Parameter, slice | None]], loss_scale: torch.Tensor) -> torch.Tensor:
        gradients = [
            parameter.main_grad if share is None else parameter.main_grad.view(-1)[share]
            for parameter, share in counted
        ]
        return (torch.nn.utils.get_total_norm(gradients).to(loss_scale) / loss_scale).square().squeeze()


def _trained_by_part(modules: Iterable[torch.nn.Module]) -> dict[str, list[Parameter]]:
    found: dict[str, list[Parameter]] = {}
    for module in modules:
        if not hasattr(module, "parts"):
            continue
        part_of = {id(parameter): name for name, part in module.parts().items() for parameter in part.parameters()}
        for parameter in module.parameters():
            if parameter.requires_grad:
                found.setdefault(part_of.get(id(parameter), OTHER), []).append(parameter)
    return found


def _shares(optimizer: MegatronOptimizer) -> dict[Parameter, slice] | None:
    """With the distributed optimizer, the range of each parameter that this rank has the whole gradient of."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    if not any(isinstance(part, DistributedOptimizer) for part in parts):
        return None
    ranges = {
        parameter: part._get_model_param_range_map(parameter)["param"]
        for part in parts
        if isinstance(part, DistributedOptimizer)
        for parameter in getattr(part, "model_param_gbuf_map", ())
    }
    return {parameter: slice(share.start, share.end) for parameter, share in ranges.items()}


def _counts(parameter: Parameter, shares: dict[Parameter, slice] | None) -> bool:
    """Whether this rank is the one that counts a parameter, or a share of it; as megatron.core's own norm does."""
    if shares is None:
        here = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    else:
        here = parameter in shares
    return here and param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)
