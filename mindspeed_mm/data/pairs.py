"""A preference record as one sequence: what both conversations begin with once, then each side's own end.

Both sides continue the same prompt and images, so these are computed once; attention lets a side see the beginning and
itself (platform/segments.BranchedSegments). The last token of the prompt opens each side, since it predicts the first
token of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from mindspeed_mm.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from mindspeed_mm.data.expand import Encoding, expand_images, fit_length
from mindspeed_mm.data.media import ItemPlan
from mindspeed_mm.data.sample import Sample, Turn
from mindspeed_mm.errors import DataError

SIDES = ("chosen", "rejected")


Branches = tuple[int, int, int]
"""Lengths of the shared beginning, of the chosen and of the rejected end; their sum is the sequence's."""


class PairTokens(NamedTuple):
    """Both sides of a record."""

    input_ids: list[int]
    labels: list[int]
    """Not shifted, IGNORE_INDEX where nothing is supervised."""

    branches: Branches


def pair_tokens(
    sample: Sample, plans: Sequence[ItemPlan], encoding: Encoding, max_length: int | None = None, policy: str = "error"
) -> PairTokens:
    """Expanded tokens of a preference record.

    Args:
        sample: one with `rejected`; its last turns are the answers that are compared, and alone supervised.
        plans: of its images, which both sides share.
        max_length: of each side, prompt included; None: any.
        policy: for a longer side, see expand.fit_length.

    Raises:
        DataError: a side is too long, or nothing of it would be supervised, or both are the same tokens.
        TemplateError: the conversation does not fit the template.
    """
    assert sample.rejected is not None
    sides = []
    for name, turns in zip(SIDES, (sample.turns, sample.rejected), strict=True):
        ids, labels = expand_images(*encoding.tokens(replace(sample, turns=_last_learned(turns))), plans)
        try:
            if max_length is not None:
                ids, labels = fit_length(ids, labels, max_length, policy)
        except DataError as error:
            raise type(error)(f"its {name} side {error}") from error
        if all(label == IGNORE_INDEX for label in labels):
            raise DataError(
                f"its {name} answer has no supervised token; expected a text, and a template that supervises answers"
            )
        sides.append((ids, labels))
    return _joined(*sides)


def _last_learned(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The conversation with its last answer alone to be learned: earlier ones are part of the prompt."""
    return (*(replace(turn, learned=False) if turn.role == "gpt" else turn for turn in turns[:-1]), turns[-1])


def _joined(chosen: tuple[list[int], list[int]], rejected: tuple[list[int], list[int]]) -> PairTokens:
    if chosen[0] == rejected[0]:
        raise DataError(
            "has the same tokens in its chosen and its rejected answer, there is nothing to prefer: remove the record"
        )
    ids, labels, (start, first, second) = joined((chosen, rejected))
    return PairTokens(ids, labels, (start, first, second))


def joined(sides: Sequence[tuple[list[int], list[int]]]) -> tuple[list[int], list[int], tuple[int, ...]]:
    """Several continuations of one prompt as one sequence.

    Args:
        sides: ids and labels of each whole conversation.

    Returns:
        Ids, labels, and the lengths of what all begin with and of each one's own end. The last token of the prompt
        opens each end.

    Raises:
        DataError: the answers stand straight behind an image.
    """
    first, common = sides[0], 0
    for tokens, *labels in zip(
        zip(*(ids for ids, _ in sides), strict=False), *(labels for _, labels in sides), strict=False
    ):
        if len(set(tokens)) > 1 or any(label != IGNORE_INDEX for label in labels):
            break
        common += 1
    start = max(0, common - 1)
    if start < common and first[0][start] == IMAGE_TOKEN_INDEX:
        raise DataError(
            "has its answers straight behind an image, without a text between: use a template that writes the "
            'question and a role before the answer, such as "v1"'
        )
    ids, labels = first[0][:start], first[1][:start]
    for side in sides:
        ids, labels = ids + side[0][start:], labels + side[1][start:]
    return ids, labels, (start, *(len(side[0]) - start for side in sides))


def longer_side(input_ids: list[int], branches: Branches) -> list[int]:
    """The shared beginning and the longer end of a pair's tokens."""
    shared, first, second = branches
    return input_ids[: shared + first] if first >= second else input_ids[:shared] + input_ids[shared + first :]


def pair_positions(branches: Sequence[int], positions: torch.Tensor | None) -> torch.Tensor:
    """Positions of tokens that `joined` gives: all ends go on where the beginning ends.

    Args:
        branches: lengths of the beginning and of each end.
        positions: [3, shared + longest end] int64 of a family with multimodal positions, None: 0, 1, 2, ...

    Returns:
        [shared + all ends] int64, or [3, ...] where positions are given.
    """
    shared, *ends = branches
    if positions is None:
        positions = torch.arange(shared + max(ends))
    parts = (positions[..., :shared], *(positions[..., shared : shared + end] for end in ends))
    return torch.cat(parts, dim=-1)
