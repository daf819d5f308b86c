"""Which trained matrices Muon moves, and how a rank's tensors become them: the weight rules of the linears say it.

They are the weights of the linears of a part's layers, of the projector, and the A and B of adapters. Where our linear
holds several of Hugging Face's (q, k and v; gate and up), each is a matrix of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.models.adapters.targets import ADAPTER, WEIGHT, all_sites
from mindspeed_mm.weights.loading import global_name
from mindspeed_mm.weights.rules import Geometry, Rule
from mindspeed_mm.weights.shards import shard, unshard


@dataclass(frozen=True)
class LinearMatrices:
    """The matrices of a linear (see megatron/driver/muon.py)."""

    rule: Rule
    geometry: Geometry

    @property
    def split(self) -> bool:
        """Whether tensor-parallel ranks hold a share each."""
        return self.rule.axis is not None

    def whole(self, shares: Sequence[Tensor]) -> list[Tensor]:
        """Hugging Face's matrices from the ranks' shares."""
        full = unshard(list(shares), self.rule, self.geometry) if len(shares) > 1 else shares[0]
        return self.rule.to_theirs(full, self.geometry)

    def share(self, matrices: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """A rank's share of them."""
        return shard(self.rule.to_ours(list(matrices), self.geometry), self.rule, rank, size, self.geometry)


@dataclass(frozen=True)
class AdapterMatrix:
    """An A or B, which is one matrix; `axis` is the one that tensor parallelism splits. The order of rows has no
    influence on what Muon makes of a matrix."""

    axis: int | None

    @property
    def split(self) -> bool:
        """Whether tensor-parallel ranks hold a share each."""
        return self.axis is not None

    def whole(self, shares: Sequence[Tensor]) -> list[Tensor]:
        """The matrix from the ranks' shares."""
        return [torch.cat(list(shares), self.axis) if len(shares) > 1 else shares[0]]

    def share(self, matrices: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """A rank's share of it."""
        return matrices[0] if self.axis is None else matrices[0].chunk(size, self.axis)[rank]


def matrices_of(part: Any, spec: Any) -> dict[str, LinearMatrices | AdapterMatrix]:
    """Name of a parameter in the part -> its matrices, of all that Muon could move."""
    found: dict[str, LinearMatrices | AdapterMatrix] = {}
    for site in all_sites(part, spec):
        rule = site.step.rule
        found[site.owner + WEIGHT] = LinearMatrices(rule, spec.geometry)
        if spec.lora is not None:
            outer = f"{site.owner}{ADAPTER}{site.short}."
            found[outer + "a"] = AdapterMatrix(1 if rule.axis == 1 else None)
            found[outer + "b"] = AdapterMatrix(0 if rule.axis == 0 else None)
    return found


def mark_matrices(module: torch.nn.Module, part: Any, spec: Any, layer_offset: int = 0) -> None:
    """Give the parameters of a built part the attribute `matrices`, which the driver's Muon reads."""
    known = matrices_of(part, spec)
    for name, parameter in module.named_parameters():
        parameter.matrices = known.get(global_name(name, layer_offset))
