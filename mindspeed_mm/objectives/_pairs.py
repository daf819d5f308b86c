"""Micro-batches of preference pairs on their way into the model, and the log-probabilities of their answers.

Legend: T positions of the row, N pairs, C conversations beside them, n supervised positions of this rank.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state, tensor_parallel

from mindspeed_mm.constants import IGNORE_INDEX
from mindspeed_mm.data.sample import Batch
from mindspeed_mm.errors import DataError
from mindspeed_mm.models.kit.context import sequence_slice
from mindspeed_mm.objectives._batches import pack_rows

ROW_FIELDS = ("input_ids", "labels", "position_ids")


class PairRow(NamedTuple):
    """All pairs of a micro-batch one behind the other."""

    batch: Batch
    """Its rows are [1, T]."""
    branches: list[tuple[int, ...]]
    """Lengths of the parts of each sequence, of padding, too (see platform/segments.BranchedSegments)."""
    owners: torch.Tensor
    """[T] int64 in host memory: 2 x pair, + 1 for the rejected side; 2 x N + number of a conversation beside the pairs;
    -1 for what both sides share and for padding."""
    pairs: int
    """N."""
    companions: int
    """C."""


def pair_row(batch: Batch, config: Any) -> PairRow:
    """A micro-batch as one row; padding stays where pipeline stages want one length.

    Raises DataError for a batch of conversations.
    """
    if batch.branches is None or batch.segment_ids is None:
        raise DataError(
            "the objective trains on preference records, but the batch holds conversations: give data sets with a "
            "chosen and a rejected answer"
        )
    row, _ = pack_rows(batch, config)
    if not batch.branches:  # every record of it was left out, and its rows hold padding alone
        row = dataclasses.replace(batch, **{name: getattr(batch, name)[..., :1, :] for name in ROW_FIELDS})
    keeps_padding = config.virtual_pipeline_model_parallel_size is not None
    branches = _sequences(batch, row.input_ids.shape[1], keeps_padding)
    pairs = sum(len(lengths) == 3 for lengths in branches)
    owners: list[int] = []
    pair = companion = 0
    for lengths in branches:
        if len(lengths) == 3:
            numbers: tuple[int, ...] = (-1, 2 * pair, 2 * pair + 1)
            pair += 1
        elif len(lengths) == 1:
            numbers = (2 * pairs + companion,)
            companion += 1
        else:  # padding
            numbers = (-1, -1)
        for owner, length in zip(numbers, lengths, strict=True):
            owners += [owner] * length
    branches = [(0, *lengths) if len(lengths) == 1 else lengths for lengths in branches]
    return PairRow(row, branches, torch.tensor(owners), pairs, companion)


def _sequences(batch: Batch, length: int, keeps_padding: bool) -> list[tuple[int, ...]]:
    """Lengths of the parts of each sequence of the row of `length`: (shared, chosen, rejected) of a pair, (n,) of a
    conversation beside them, (0, n) of padding, which stands at the end, and behind the others of each of the batch's
    rows where it is kept."""
    assert batch.branches is not None and batch.segment_ids is not None
    found: list[tuple[int, ...]] = []
    pairs = list(batch.branches)
    for count in batch.segment_ids.amax(dim=1).tolist() if pairs else ():
        own, pairs = pairs[:count], pairs[count:]
        padding = batch.segment_ids.shape[1] - sum(map(sum, own))
        found += [*own, (0, padding)] if keeps_padding and padding else own
    rest = length - sum(map(sum, found))
    return [*found, (0, rest)] if rest else found


class PairSums(NamedTuple):
    """Sums over the supervised tokens of each answer, equal on all context-parallel ranks; each [N, 2]."""

    log_probs: torch.Tensor
    """float32, with gradient."""
    logits: torch.Tensor
    """float32: of the positions' mean logits."""
    lengths: torch.Tensor
    """float32: number of tokens."""
    beside: torch.Tensor
    """[C] float32, with gradient: of the conversations beside the pairs, the log-probability of a token on average."""


def pair_sums(values: torch.Tensor, row: PairRow) -> PairSums:
    """Sum up what models/loss.token_log_probs gives.

    Args:
        values: [n, 2] float32 of this rank's slice of the row.
    """
    labels = row.batch.labels
    count = 2 * row.pairs + row.companions
    supervised = (sequence_slice(labels, 1)[0] != IGNORE_INDEX).nonzero().squeeze(1)
    owners = sequence_slice(row.owners, 0)[supervised].to(values.device, non_blocking=True)
    sums = values.new_zeros(count, 2).index_add(0, owners, values)
    group = parallel_state.get_context_parallel_group()
    if group.size() > 1:
        sums = tensor_parallel.reduce_from_tensor_model_parallel_region(sums, group)
    lengths = torch.bincount(row.owners[labels[0] != IGNORE_INDEX], minlength=count)
    log_probs, logits = sums.unbind(1)
    lengths = lengths.to(values.device, torch.float32, non_blocking=True)
    sides = (x[: 2 * row.pairs].view(-1, 2) for x in (log_probs, logits.detach(), lengths))
    own, tokens = (x[2 * row.pairs :] for x in (log_probs, lengths))
    return PairSums(*sides, own / tokens.clamp(min=1))  # an answer without a text has no token
