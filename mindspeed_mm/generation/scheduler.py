"""Continuous batching: rows leave the batch when their sequence ends, waiting requests take their place.

No padding runs through the model but within a group of prompts of almost equal length. The books of a step: every
entry's rows are cache rows; after each step the rows that go on are moved together at the front of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mindspeed_mm.errors import DataError
from mindspeed_mm.generation.decode import Decoder
from mindspeed_mm.generation.jobs import Job, Step
from mindspeed_mm.generation.pictures import PictureFeatures

MAX_PADDING = 0.1
"""Share of a prefill that may be padding."""

PREFILL_TOKENS = 8192
"""Tokens of one prefill at most (one longer prompt goes alone), which bounds the memory for activations."""

WINDOW = 8
"""Waiting requests per free row that are looked at for prompts of equal length; older ones come first."""


@dataclass(eq=False)
class Entry:
    """A request on its way through the batch."""

    job: Job
    prompt: Sequence[int]
    """Expanded ids."""
    max_length: int
    """Of prompt and answer together."""
    images: Sequence[Any]
    """What PictureFeatures takes; looked at when the prompt is filled in, and an error fails this request alone."""
    on_end: Callable[[DataError | None], None]
    """Called once: with None at the end (or when cancelled), or with the error."""
    cancelled: bool = False
    rows: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    length: int = 0
    """Tokens that each of its rows holds in the cache."""


class Scheduler:
    """Runs entries in batches of up to `max_rows` rows. A request that needs more rows runs alone."""

    def __init__(self, decoder: Decoder, pictures: PictureFeatures, max_rows: int = 16) -> None:
        self.decoder, self.pictures, self.max_rows = decoder, pictures, max_rows
        self._waiting: list[Entry] = []
        self._active: list[Entry] = []

    @property
    def busy(self) -> bool:
        """True while any request waits or runs."""
        return bool(self._waiting or self._active)

    def submit(self, entry: Entry) -> None:
        """Append a request to the queue."""
        self._waiting.append(entry)

    def step(self) -> bool:
        """Admit what fits and generate one token for every row. Returns `busy`."""
        self._drop_cancelled()
        while group := self._next_group():
            self._prefill(group)
        if self._active:
            self._decode()
        return self.busy

    def _drop_cancelled(self) -> None:
        dropped = [entry for entry in (*self._waiting, *self._active) if entry.cancelled]
        if dropped:
            self._waiting = [entry for entry in self._waiting if not entry.cancelled]
            self._active = [entry for entry in self._active if not entry.cancelled]
            self._pack()
            for entry in dropped:
                entry.on_end(None)

    def _next_group(self) -> list[Entry]:
        """The oldest waiting request that fits, and others with prompts about as long."""
        free = self.max_rows - sum(len(entry.rows) for entry in self._active)
        if not self._waiting or (self._active and self._waiting[0].job.width > free):
            return []
        oldest = self._waiting[0]
        group, longest, total = [oldest], len(oldest.prompt), len(oldest.prompt)
        free -= oldest.job.width
        window = self._waiting[1 : 1 + WINDOW * max(free, 0)]
        for entry in sorted(window, key=lambda entry: abs(len(entry.prompt) - len(oldest.prompt))):
            width, tokens = max(longest, len(entry.prompt)), total + len(entry.prompt)
            area = width * (len(group) + 1)
            if entry.job.width <= free and area <= PREFILL_TOKENS and area - tokens <= MAX_PADDING * area:
                group.append(entry)
                longest, total, free = width, tokens, free - entry.job.width
        self._waiting = [entry for entry in self._waiting if entry not in group]
        return group

    def _prefill(self, group: list[Entry]) -> None:
        group, features = self._with_features(group)
        if not group:
            return
        first = sum(len(entry.rows) for entry in self._active)
        rows = first + sum(entry.job.width for entry in group)
        self.decoder.cache.reserve(rows, max(entry.max_length for entry in (*self._active, *group)))
        logits = self.decoder.prefill([entry.prompt for entry in group], features, first)
        for index, entry in enumerate(group):
            entry.rows, entry.length = [first + index], len(entry.prompt)
        self._advance(group, logits, first)

    def _with_features(self, group: list[Entry]) -> tuple[list[Entry], list[torch.Tensor | None]]:
        """The entries whose pictures can be used, and all features in their order."""
        found, kept, features = [], [], []
        for entry in group:
            try:
                found.append((entry, self.pictures.find(entry.images)))
            except DataError as error:
                entry.on_end(error)
        for (entry, _), own in zip(found, self.pictures.features([own for _, own in found]), strict=True):
            if isinstance(own, DataError):
                entry.on_end(own)
                continue
            kept.append(entry)
            features += own
        return kept, features

    def _decode(self) -> None:
        pairs = [
            (row, token, entry.length)
            for entry in self._active
            for row, token in zip(entry.rows, entry.tokens, strict=True)
        ]
        pairs.sort()
        logits = self.decoder.step([token for _, token, _ in pairs], [length for _, _, length in pairs])
        entries, self._active = self._active, []
        for entry in entries:
            entry.length += 1
        self._advance(entries, logits, 0)

    def _advance(self, entries: list[Entry], logits: torch.Tensor, first: int) -> None:
        """Hand every entry the logits of its rows (row `first` of the cache is row 0 of `logits`)."""
        likeliest = logits.argmax(-1).tolist()
        on_host = logits.cpu() if any(entry.job.needs_logits for entry in entries) else None
        ended = []
        for entry in entries:
            places = [row - first for row in entry.rows]
            own = on_host[places] if entry.job.needs_logits else None
            step: Step = entry.job.advance(own, [likeliest[place] for place in places])
            entry.rows, entry.tokens = [entry.rows[parent] for parent in step.parents], step.tokens
            if entry.rows:
                self._active.append(entry)
            else:
                ended.append(entry)
        self._pack()
        for entry in ended:
            entry.on_end(None)

    def _pack(self) -> None:
        """Give the rows that go on the cache rows 0..R-1: most stay, the others are copied into the gaps."""
        wanted = [(entry, index, row) for entry in self._active for index, row in enumerate(entry.rows)]
        free, moving = set(range(len(wanted))), []
        for entry, index, row in wanted:
            if row in free:
                free.remove(row)
            else:
                moving.append((entry, index, row))
        moves = list(zip(moving, sorted(free), strict=True))
        sources, targets = [row for (_, _, row), _ in moves], [target for _, target in moves]
        self.decoder.cache.copy_rows(sources, targets, max((entry.length for entry in self._active), default=0))
        for (entry, index, _), target in moves:
            entry.rows[index] = target
