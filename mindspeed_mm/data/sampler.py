"""The order of samples: one endless sequence that depends on the seed (and on what orders are made of) alone.

An order maps a position of the sequence to an index of the dataset, or to the indices that share a row (packing). A
position is all the state there is, so training resumes at any sample and with any number of ranks.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from torch.utils.data import Sampler

from mindspeed_mm.errors import ConfigError

KEPT_EPOCHS = 2
"""A micro-batch may span two epochs or blocks; older ones are not needed again."""


class Order(Protocol):
    """One endless sequence."""

    def at(self, position: int) -> int | tuple[int, ...]:
        """What stands at a position."""
        ...


class _Blocks:
    """Arrays that are made when they are asked for, the last few kept."""

    def __init__(self) -> None:
        self._kept: dict[int, np.ndarray] = {}

    def get(self, number: int, make) -> np.ndarray:
        if number not in self._kept:
            self._kept = {known: block for known, block in self._kept.items() if known > number - KEPT_EPOCHS}
            self._kept[number] = make()
        return self._kept[number]


class EpochOrder:
    """Epochs follow each other without a gap, each a permutation of its own."""

    def __init__(self, length: int, *, seed: int, shuffle: bool = True):
        _refuse(("number of samples", length, 1), ("seed", seed, 0))
        self._length, self._seed, self._shuffle = length, seed, shuffle
        self._epochs = _Blocks()

    def at(self, position: int) -> int:
        epoch, offset = divmod(position, self._length)
        if not self._shuffle:
            return offset
        order = self._epochs.get(epoch, lambda: np.random.default_rng([self._seed, epoch]).permutation(self._length))
        return int(order[offset])


class WeightedOrder:
    """Several sets in fixed proportions; each is an endless sequence of its own.

    The sequence is cut into blocks. The first n samples of the sequence hold, up to the shuffling inside a block,
    floor(n * c) samples of the sets up to one, c being their share: no proportion ever drifts.
    """

    BLOCK = 1024

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], *, seed: int, shuffle: bool = True):
        """`sizes` are the lengths of the sets, which follow each other in the dataset."""
        _refuse(*((f"size of set {number}", size, 1) for number, size in enumerate(sizes)))
        self._starts = np.cumsum([0, *sizes[:-1]])
        self._shares = np.cumsum(np.asarray(weights, dtype=np.float64)) / float(sum(weights))
        self._shares[-1] = 1.0
        self._seed, self._shuffle = seed, shuffle
        self._orders = [
            EpochOrder(size, seed=seed * len(sizes) + number, shuffle=shuffle) for number, size in enumerate(sizes)
        ]
        self._blocks = _Blocks()

    def at(self, position: int) -> int:
        block, offset = divmod(position, self.BLOCK)
        return int(self._blocks.get(block, lambda: self._block(block))[offset])

    def _counts(self, positions: int) -> np.ndarray:
        """How many samples of each set the first `positions` hold."""
        return np.diff(np.floor(positions * self._shares), prepend=0.0).astype(np.int64)

    def _block(self, block: int) -> np.ndarray:
        before, after = self._counts(block * self.BLOCK), self._counts((block + 1) * self.BLOCK)
        chosen = [
            self._starts[number] + order.at(place)
            for number, order in enumerate(self._orders)
            for place in range(before[number], after[number])
        ]
        order = np.random.default_rng([self._seed, block, len(self._orders)]).permutation(self.BLOCK)
        return np.asarray(chosen, dtype=np.int64)[order]


class GroupedOrder:
    """LLaVA's group_by_modality_length: global batches with images, global batches without, and mixed ones of the rest.

    Inside a batch the longest samples come first, so that micro-batches hold samples of about one length. Epochs whose
    length is no multiple of the batch run on into each other through the mixed batches.
    """

    def __init__(self, lengths: np.ndarray, *, batch: int, seed: int):
        """`lengths` [n] are in tokens, negative for samples without images; `batch` is the global batch size."""
        _refuse(("number of samples", len(lengths), 1), ("batch size", batch, 1), ("seed", seed, 0))
        self._lengths, self._batch, self._seed = lengths, batch, seed
        self._epochs = _Blocks()

    def at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self._lengths))
        return int(self._epochs.get(epoch, lambda: self._epoch(epoch))[offset])

    def _epoch(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self._seed, epoch])
        groups, rest = [], []
        for members in (np.flatnonzero(self._lengths > 0), np.flatnonzero(self._lengths <= 0)):
            members = generator.permutation(members)
            whole = len(members) // self._batch * self._batch
            groups += [members[i : i + self._batch] for i in range(0, whole, self._batch)]
            rest.append(members[whole:])
        groups = [groups[i] for i in generator.permutation(len(groups))]
        # The epoch begins inside a batch of the sequence: so many samples complete it.
        head = -epoch * len(self._lengths) % self._batch
        while groups and sum(map(len, rest)) < head:
            rest.append(groups.pop())
        mixed = generator.permutation(np.concatenate(rest))
        parts = [mixed[:head], *groups]
        parts += [mixed[i : i + self._batch] for i in range(head, len(mixed), self._batch)]
        by_length = [part[np.argsort(-np.abs(self._lengths[part]), kind="stable")] for part in parts]
        return np.concatenate(by_length).astype(np.int64)


class MixedOrder:
    """An order of the samples of a mixed epoch, as indices of the dataset."""

    def __init__(self, order: Order, epoch: np.ndarray):
        """`epoch` [n] int64 are indices of the dataset; `order` gives indices of `epoch`, one at a position."""
        self._order, self._epoch = order, epoch

    def at(self, position: int) -> int:
        return int(self._epoch[self._order.at(position)])


class EndlessBatchSampler(Sampler[list[int]]):
    """Micro-batches of one data-parallel rank.

    With M = micro_batch_size * dp_size, sample i of micro-batch m of rank r sits at position
    consumed_samples + m * M + r * micro_batch_size + i of the sequence.
    """

    def __init__(self, order: Order, *, consumed_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int):
        """Raises ConfigError for sizes and ranks that are not possible."""
        _refuse(
            ("consumed_samples", consumed_samples, 0),
            ("micro_batch_size", micro_batch_size, 1),
            ("dp_size", dp_size, 1),
        )
        if not 0 <= dp_rank < dp_size:
            raise ConfigError(f"data sampler: dp_rank is {dp_rank}, expected 0 to {dp_size - 1}")
        self._order = order
        self._start = consumed_samples + dp_rank * micro_batch_size
        self._step = micro_batch_size * dp_size
        self._micro_batch_size = micro_batch_size

    def __iter__(self) -> Iterator[list]:
        position = self._start
        while True:
            yield [self._order.at(position + i) for i in range(self._micro_batch_size)]
            position += self._step


def _refuse(*sizes: tuple[str, int, int]) -> None:
    problems = [f"{name} is {value}, expected at least {least}" for name, value, least in sizes if value < least]
    if problems:
        raise ConfigError("data sampler: " + "; ".join(problems))
