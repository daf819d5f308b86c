"""An exponential moving average of the trained weights (--ema-decay), kept beside them in float32.

It begins with the weights that the run begins with. After each update of the optimizer it becomes
decay x average + (1 - decay) x weights, as torch.optim.swa_utils.get_ema_multi_avg_fn has it. Each rank averages what
its optimizer holds, so under the distributed optimizer the average is shared over the ranks like the rest of its state.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from torch.nn import Parameter

from megatron.driver.checkpoint.reading import AVERAGE_PREFIX, SafeReader, reading_errors
from megatron.driver.checkpoint.sharding import AVERAGES, built
from megatron.driver.collectives import gather
from megatron.driver.held_parameters import held_parameters
from megatron.driver.initialize import is_rank_0

logger = logging.getLogger(__name__)

LOADED_BYTES = 2**31
"""Averages that are whole in host memory at once while they are loaded."""


class WeightAverage:
    """The averages of this rank's trained parameters."""

    def __init__(self, optimizer: MegatronOptimizer, decay: float) -> None:
        self.decay = decay
        self._held = list(held_parameters(optimizer))
        self._averages = [held.main.detach().clone() for held in self._held]
        self._places = {held.model: number for number, held in enumerate(self._held)}

    @torch.no_grad()
    def begin(self) -> None:
        """Begin anew with the present weights."""
        for average, held in zip(self._averages, self._held, strict=True):
            average.copy_(held.main)

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights in, after the optimizer has moved them."""
        if self._averages:
            torch._foreach_lerp_(self._averages, [held.main for held in self._held], 1 - self.decay)

    @contextlib.contextmanager
    def in_place(self, modules: Sequence[torch.nn.Module]) -> Iterator[None]:
        """Inside, the model computes with the averages, in the type of its weights. Collective over the data-parallel
        ranks. The weights are copied meanwhile; what the optimizer holds stays as it is."""
        kept: list[tuple[Parameter, Tensor]] = []
        try:
            with torch.no_grad():
                for parameter in (each for module in modules for each in module.parameters() if each.requires_grad):
                    average = self._joined(parameter)
                    kept.append((parameter, parameter.detach().clone()))
                    parameter.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for parameter, weights in kept:
                    parameter.copy_(weights)

    def sharded(self, tensors: ShardedStateDict) -> ShardedStateDict:
        """The averages of the trained ones among the model's sharded `tensors`, in float32, whole on the first
        data-parallel rank, which writes them. Collective over the data-parallel ranks."""
        return _asking(tensors, self._whole)

    def load(self, tensors: ShardedStateDict, path: Path) -> None:
        """Take the averages of a checkpoint at any layout. Those that it lacks begin with the loaded weights.
        Collective."""
        self.begin()
        wanted = _asking(tensors, _nothing)
        held = SafeReader(path).read_metadata().state_dict_metadata
        known = {name: item for name, item in wanted.items() if all(part.key in held for part in built({name: item}))}
        missing = {name for rank in gather(sorted(wanted.keys() - known.keys())) for name in rank}
        if missing and is_rank_0():
            logger.warning(
                "%s holds no moving average of %d parameters, such as %s: theirs begins with the loaded weights",
                *(path, len(missing), min(missing)),
            )
        names, size = list(known), sum(4 * tensors[name].data.numel() for name in known)
        rounds = max(gather(-(-size // LOADED_BYTES)))
        for number in range(rounds):
            with reading_errors(path):
                asked = _asking({name: tensors[name] for name in names[number::rounds]}, _room)
                loaded = dist_checkpointing.load({AVERAGES: asked}, str(path)).get(AVERAGES, {})
            for name in asked:
                self._take(tensors[name].data, loaded[name])

    def _take(self, parameter: Parameter, whole: Tensor) -> None:
        number = self._places.get(parameter)
        if number is not None:
            share = self._held[number].share
            self._averages[number].copy_(whole if share is None else whole.reshape(-1)[share])

    @torch.no_grad()
    def _whole(self, parameter: Parameter) -> Tensor:
        """The average of a parameter of this rank; where ranks share it, on the first one of them."""
        number = self._places.get(parameter)
        whole = self._joined(parameter)
        if number is not None and self._held[number].share is None:
            return whole
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return whole.cpu() if torch.distributed.get_rank(group) == 0 else _nothing(parameter)

    def _joined(self, parameter: Parameter) -> Tensor:
        """The average of a parameter of this rank on all ranks that share it."""
        number = self._places.get(parameter)
        if number is not None and self._held[number].share is None:
            return self._averages[number]
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if number is not None:
            whole[self._held[number].share] = self._averages[number]
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(whole, group=group)
        return whole.view(parameter.shape)


def _asking(tensors: ShardedStateDict, value: Callable[[Parameter], Tensor]) -> ShardedStateDict:
    """The trained ones among the model's sharded tensors, under the names of their averages and with other values."""
    found = {}
    for name, item in tensors.items():
        if not (isinstance(item.data, Parameter) and item.data.requires_grad):
            continue
        changes = {"key": AVERAGE_PREFIX + item.key, "data": value(item.data)}
        if not isinstance(item, ShardedTensorFactory):
            changes["dtype"] = torch.float32
        found[name] = replace(item, **changes)
    return found


def _nothing(parameter: Parameter) -> Tensor:
    """A tensor of a parameter's shape without memory of that size."""
    return torch.zeros((), dtype=torch.float32).expand(parameter.shape)


def _room(parameter: Parameter) -> Tensor:
    return torch.empty(parameter.shape, dtype=torch.float32)


def tell_left_behind(path: Path) -> None:
    """Say so where a checkpoint has averages that the run does not keep."""
    held = SafeReader(path).read_metadata().state_dict_metadata
    if is_rank_0() and any(name.startswith(AVERAGE_PREFIX) for name in held):
        logger.warning(
            "%s holds a moving average of the weights, which this run does not go on with: give --ema-decay to keep it",
            path,
        )
