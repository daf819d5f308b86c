"""The order of samples: one endless sequence that depends on the seed alone.

Epochs follow each other without a gap, each a permutation of its own. A position in the sequence is all the state there
is, so training resumes at any sample and with any number of ranks.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from mindspeed_mm.errors import ConfigError


class EndlessBatchSampler(Sampler[list[int]]):
    """Micro-batches of one data-parallel rank.

    With M = micro_batch_size * dp_size, sample i of micro-batch m of rank r sits at position
    consumed_samples + m * M + r * micro_batch_size + i of the sequence.
    """

    def __init__(
        self,
        length: int,
        *,
        consumed_samples: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        shuffle: bool = True,
    ):
        """Raises ConfigError for sizes and ranks that are not possible."""
        problems = [
            f"{name} is {value}, expected at least {least}"
            for name, value, least in (
                ("number of samples", length, 1),
                ("consumed_samples", consumed_samples, 0),
                ("micro_batch_size", micro_batch_size, 1),
                ("dp_size", dp_size, 1),
                ("seed", seed, 0),
            )
            if value < least
        ]
        if not 0 <= dp_rank < max(dp_size, 1):
            problems.append(f"dp_rank is {dp_rank}, expected 0 to {dp_size - 1}")
        if problems:
            raise ConfigError("data sampler: " + "; ".join(problems))
        self._length = length
        self._start = consumed_samples + dp_rank * micro_batch_size
        self._step = micro_batch_size * dp_size
        self._micro_batch_size = micro_batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._orders: dict[int, np.ndarray] = {}

    def __iter__(self) -> Iterator[list[int]]:
        position = self._start
        while True:
            yield [self.sample_at(position + i) for i in range(self._micro_batch_size)]
            position += self._step

    def sample_at(self, position: int) -> int:
        """Index of the sample at a position of the endless sequence."""
        epoch, offset = divmod(position, self._length)
        if not self._shuffle:
            return offset
        if epoch not in self._orders:
            # A micro-batch may span two epochs; older orders are not needed again.
            self._orders = {known: order for known, order in self._orders.items() if known >= epoch - 1}
            self._orders[epoch] = np.random.default_rng([self._seed, epoch]).permutation(self._length)
        return int(self._orders[epoch][offset])
