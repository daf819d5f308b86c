"""A and B of one linear as a tensor-parallel rank holds them, and back. The weight rule of the linear says how.

Where our linear is made of several of Hugging Face's (q, k and v), each has its own B, whose rows are split in their
own order. Where one of Hugging Face's makes all of ours, the rows of B stand in the order of our weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_mm.models.adapters.targets import Site
from mindspeed_mm.weights.rules import Geometry
from mindspeed_mm.weights.shards import check_divisible, shard


def places(site: Site, rows: int, geometry: Geometry) -> Tensor | None:
    """Where the rows of a linear stand among the `rows` of ours; None where it makes all of them.

    `geometry` is the one local to a rank for the rows of a rank, and the whole one for all rows.
    """
    if len(site.step.sources) == 1:
        return None
    return site.step.rule.to_theirs(torch.arange(rows), geometry)[site.number]


def local_geometry(site: Site, geometry: Geometry, tp_size: int) -> Geometry:
    """The geometry of one rank's rows."""
    split = site.step.rule.axis == 0 and site.step.rule.units(geometry) is not None
    return geometry.local(tp_size) if split else geometry


def local_a(site: Site, a: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """This rank's columns of A [r, in]."""
    return a if site.step.rule.axis == 0 else a.chunk(tp_size, dim=1)[tp_rank]


def local_b(site: Site, b: Tensor, geometry: Geometry, tp_rank: int, tp_size: int) -> Tensor:
    """This rank's rows of B [out, r]. Raises WeightError where they do not divide."""
    rule = site.step.rule
    if rule.axis == 1:
        return b
    if len(site.step.sources) == 1:
        return shard(rule.to_ours([b], geometry), rule, tp_rank, tp_size, geometry)
    check_divisible(b.shape[0] * rule.blocks(geometry), rule, tp_size, geometry)
    return b.chunk(tp_size)[tp_rank]


def their_b(site: Site, b: Tensor, geometry: Geometry) -> Tensor:
    """The whole B in Hugging Face's order, from the whole B in ours (the ranks' rows of a checkpoint joined)."""
    return site.step.rule.to_theirs(b, geometry)[0] if len(site.step.sources) == 1 else b


def with_lengths(site: Site, weight: Tensor, m: Tensor, geometry: Geometry) -> Tensor:
    """Our whole weight [out, in] whose rows of this linear have the lengths m [out], in the order of `their_b`."""
    if len(site.step.sources) == 1:
        return of_length(weight, site.step.rule.to_ours([m[:, None]], geometry)[:, 0])
    rows = places(site, weight.shape[0], geometry)
    return weight.index_copy(0, rows, of_length(weight[rows], m))


def of_length(weight: Tensor, m: Tensor) -> Tensor:
    """A weight [out, in] with rows of the lengths m [out]."""
    return weight * (m / weight.norm(dim=1))[:, None]


def add_product(site: Site, weight: Tensor, product: Tensor, geometry: Geometry) -> Tensor:
    """Our whole weight [out, in] plus the scaled product of whole B and A, whose rows are in the order of `their_b`."""
    if len(site.step.sources) == 1:
        return weight + site.step.rule.to_ours([product], geometry)
    return weight.index_add(0, places(site, weight.shape[0], geometry), product)
