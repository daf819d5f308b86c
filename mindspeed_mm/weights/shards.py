"""The parallel layout of our tensors: which slice a tensor-parallel rank holds.

Which layers a pipeline stage holds is said by models/parallel.py and the module that was built.
"""

import torch
from torch import Tensor

from mindspeed_mm.errors import WeightError
from mindspeed_mm.weights.rules import Geometry, Rule


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """The vocabulary size rounded up so that every tensor-parallel rank holds equally many rows."""
    return -(-vocab_size // tp_size) * tp_size


def shard(tensor: Tensor, rule: Rule, tp_rank: int, tp_size: int, geometry: Geometry) -> Tensor:
    """The slice of our full tensor that one tensor-parallel rank holds (a view where possible).

    Vocabulary rows are padded with zeros to a multiple of `tp_size`. Raises WeightError when it does not divide.
    """
    if tp_size == 1 or rule.axis is None:
        return tensor
    check_divisible(tensor.shape[rule.axis], rule, tp_size, geometry)
    if rule.padded:
        rows = padded_vocab_size(tensor.shape[0], tp_size) // tp_size
        real = tensor[tp_rank * rows : (tp_rank + 1) * rows]
        return torch.cat([real, real.new_zeros(rows - real.shape[0], *real.shape[1:])])
    pieces = [block.chunk(tp_size, rule.axis)[tp_rank] for block in tensor.chunk(rule.blocks(geometry), dim=rule.axis)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=rule.axis)


def unshard(shards: list[Tensor], rule: Rule, geometry: Geometry) -> Tensor:
    """Our full tensor from the slices of all tensor-parallel ranks in order, without padding rows.

    Raises WeightError when replicated slices differ.
    """
    if rule.axis is None:
        if any(not torch.equal(other, shards[0]) for other in shards[1:]):
            raise WeightError(
                f"{rule.target}: the tensor-parallel ranks hold different copies; expected equal ones. "
                "The checkpoint mixes runs or is damaged."
            )
        return shards[0]
    blocks = rule.blocks(geometry)
    per_rank = [piece.chunk(blocks, dim=rule.axis) for piece in shards]
    full = torch.cat([pieces[block] for block in range(blocks) for pieces in per_rank], dim=rule.axis)
    return full[: geometry.vocab_size] if rule.padded and geometry.vocab_size else full


def check_divisible(size: int, rule: Rule, tp_size: int, geometry: Geometry) -> None:
    """Raise WeightError unless `size` (of our full tensor along the rule's axis) splits evenly over the ranks."""
    if rule.padded:
        return
    units = rule.units(geometry)
    if units is not None and units % tp_size:
        raise WeightError(
            f"{rule.target}: {units} query groups cannot be split over tensor-parallel size {tp_size}; "
            "expected a divisor of the number of query groups. Lower the tensor-parallel size."
        )
    if size % (rule.blocks(geometry) * tp_size):
        raise WeightError(
            f"{rule.target}: size {size} cannot be split over tensor-parallel size {tp_size}; "
            "expected a multiple of it. Lower the tensor-parallel size."
        )
