"""What an interaction in front of the head looks at: features of the images, and which of them each position sees.

A position sees the images that stand before it in its own sequence, never a later one: an answer is then the same
whether it is trained, computed at once or decoded from a cache.

Legend: B batch, S sequence, I items, F features, W their width.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from megatron.core import parallel_state

from mindspeed_mm.models.fusion import image_positions
from mindspeed_mm.models.kit.context import sequence_slice
from mindspeed_mm.platform.segments import Segments


class ShownImages(NamedTuple):
    """The features of a micro-batch's images as an interaction takes them."""

    values: torch.Tensor
    """[F, W] of all items in reading order."""
    counts: tuple[int, ...]
    """[I] features of each item."""
    placeholders: tuple[int, ...]
    """[I] image positions of each item."""


class TextView(NamedTuple):
    """What each position of a text may attend to in it, where an interaction asks; see VLM.forward."""

    mask: torch.Tensor | None = None
    segments: Segments | None = None


@dataclass(frozen=True)
class Memory:
    """Features, what each position sees of them, and of the text. No features for an interaction that looks at none."""

    values: torch.Tensor | None
    """[F, W]"""
    seen: torch.Tensor | None
    """[..., 2] int64: the first feature that a position sees and the one behind the last; equal where it sees none."""
    text: TextView = TextView()

    def at(self, places: torch.Tensor) -> Memory:
        """That of some positions of this rank's slice of a batch, [n] int64 counted column by column."""
        if self.seen is None:
            return self
        seen = sequence_slice(self.seen, 1).transpose(0, 1).flatten(0, 1)
        return Memory(self.values, seen[places.to(seen.device)])


def memory_of(shown: ShownImages | None, input_ids: torch.Tensor, text: TextView) -> Memory:
    """What each position of a whole micro-batch sees, [B, S, 2] on the ids' device.

    Args:
        shown: None: nothing of any image.
        input_ids: [B, S] int64, IMAGE_TOKEN_INDEX at image positions.
        text: its segments are the sequences of a single row; without, each row is one.
    """
    if shown is None:
        return Memory(None, None, text)
    rows, length = input_ids.shape
    segments = text.segments
    device = input_ids.device
    places = image_positions(input_ids).flatten().nonzero().squeeze(1)
    ahead = [0, *itertools.accumulate(shown.placeholders)][:-1]
    begins = places[torch.tensor(ahead, dtype=torch.int64, device=device)]  # of each item in all rows one by one
    edges = torch.tensor([0, *itertools.accumulate(shown.counts)], dtype=torch.int64, device=device)
    at = torch.arange(rows * length, device=device)
    if segments is None:
        firsts = at - at % length
    else:
        starts = torch.tensor([0, *segments.ends], device=device)
        firsts = starts[torch.searchsorted(starts, at, right=True) - 1]
    seen = (edges[torch.searchsorted(begins, bounds)] for bounds in (firsts, at + 1))
    return Memory(shown.values, torch.stack(tuple(seen), dim=-1).view(rows, length, 2), text)


def interacted(interaction: torch.nn.Module, hidden: torch.Tensor, memory: Memory) -> torch.Tensor:
    """What an interaction makes of all positions of this rank's slice, [S, B, H] -> [S, B, H]."""
    if interaction.reads_text:
        return interaction.over_text(hidden, memory.text)
    places = torch.arange(hidden.shape[0] * hidden.shape[1])
    return interaction(hidden.flatten(0, 1), memory.at(places)).view_as(hidden)


class InteractingDecoder:
    """A text decoder's last stage whose head reads what an interaction makes of the final hidden states."""

    def __init__(self, decoder, interaction: torch.nn.Module, memory: Memory) -> None:
        self._decoder, self._interaction, self._memory = decoder, interaction, memory
        self.vocab_size, self.logits = decoder.vocab_size, decoder.logits

    def picked(self, hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """As TextDecoder.picked, behind the interaction."""
        if not self._interaction.reads_text:
            return self._interaction(self._decoder.picked(hidden, places), self._memory.at(places))
        whole = interacted(self._interaction, self._decoder.gather_sequence(hidden), self._memory)
        return whole.flatten(0, 1)[places.to(hidden.device, non_blocking=True)]


class FeatureTransfer:
    """Takes the features of each micro-batch from the first pipeline stage to the last one, past the others.

    They go over the group of both stages, which nothing else uses during a step. The schedule of any pipeline passes
    micro-batches in one order through both.
    """

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self._width, self._dtype = width, dtype
        self._group = parallel_state.get_embedding_group()
        self._under_way: deque[tuple] = deque()

    def send(self, shown: ShownImages) -> None:
        """From the first stage; does not wait."""
        last, values = parallel_state.get_pipeline_model_parallel_last_rank(), shown.values.detach().contiguous()
        sizes = torch.tensor(list(values.shape[:1]) + [len(shown.counts)], device=values.device)
        counts = torch.tensor([shown.counts, shown.placeholders], dtype=torch.int64, device=values.device)
        while self._under_way and self._under_way[0][0].is_completed():
            self._under_way.popleft()
        for tensor in (sizes, counts, values):
            if tensor.numel():
                self._under_way.append((torch.distributed.isend(tensor, last, group=self._group), tensor))

    def receive(self, device: torch.device) -> ShownImages:
        """On the last stage, what the first one sent next."""
        first = parallel_state.get_pipeline_model_parallel_first_rank()

        def taken(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            tensor = torch.empty(shape, dtype=dtype, device=device)
            if tensor.numel():
                torch.distributed.recv(tensor, first, group=self._group)
            return tensor

        features, items = taken(2).tolist()
        counts: Sequence[Sequence[int]] = taken(2, items).tolist()
        return ShownImages(taken(features, self._width, dtype=self._dtype), tuple(counts[0]), tuple(counts[1]))
