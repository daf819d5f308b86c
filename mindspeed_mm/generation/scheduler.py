"""Continuous batching: rows leave the batch when their sequence ends, waiting requests take their place.

No padding runs through the model but within a group of prompts of almost equal length, and none where the decoder packs
prompts. A prompt that begins as another one does is filled in from there (see prefix.py). The books of a step: every
entry's rows are cache rows; after each step the rows that go on are moved together at the front of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
from mindspeed_mm.errors import DataError, add_note
from mindspeed_mm.generation.decode import Decoder
from mindspeed_mm.generation.images import FoundImage, ImageFeatures
from mindspeed_mm.generation.jobs import GenerationJob, NextTokens
from mindspeed_mm.generation.prefix import KeptRows, common, content, longest, whole_images
from mindspeed_mm.platform import current_platform

MAX_PADDING = 0.1
"""Share of a prefill that may be padding."""

WINDOW = 8
"""Waiting requests per free row that are looked at for prompts of equal length; older ones come first."""


NAMED = 8
"""Requests that an error names."""


@dataclass(eq=False)
class Entry:
    """A request on its way through the batch."""

    job: GenerationJob
    prompt: Sequence[int]
    """Expanded ids."""
    max_length: int
    """Of prompt and answer together."""
    images: Sequence[Any]
    """What ImageFeatures takes; looked at when the prompt's turn comes, and an error fails this request alone."""
    on_end: Callable[[DataError | None], None]
    """Called once: with None at the end (or when cancelled), or with the error."""
    name: str = ""
    """The request's id."""
    cancelled: bool = False
    rows: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """The next token of each row, not in the cache yet."""
    said: list[list[int]] = field(default_factory=list)
    """The tokens of each row behind the prompt that are in the cache."""
    length: int = 0
    """Tokens that each of its rows holds in the cache."""
    found_images: list[FoundImage] = field(default_factory=list)
    shown_features: list[torch.Tensor | None] = field(default_factory=list)
    """Of all its images, kept while it runs, for an interaction in front of the head."""
    content: np.ndarray | None = None
    """Of the prompt, see prefix.py; None until the images were found."""
    source: int | None = None
    """Row that holds the first `start` positions already, when the prompt's turn comes."""
    start: int = 0
    shown: int = 0
    """Images among those positions."""
    positions: torch.Tensor | None = None
    """[3, length] of the prompt, for a family with multimodal positions; the answer continues behind the largest."""

    @cached_property
    def offset(self) -> int:
        """What the position of a token of the answer is ahead of its place in the row."""
        return 0 if self.positions is None else int(self.positions.max()) + 1 - self.positions.shape[1]

    @property
    def rest(self) -> int:
        """Positions to compute."""
        return len(self.prompt) - self.start


class Scheduler:
    """Runs entries in batches of up to `max_rows` rows. A request that needs more rows runs alone."""

    def __init__(self, decoder: Decoder, image_features: ImageFeatures, max_rows: int = 16) -> None:
        self.decoder, self.image_features, self.max_rows = decoder, image_features, max_rows
        self._prefill_tokens = current_platform().inference_tokens  # one longer prompt goes alone
        self._waiting: list[Entry] = []
        self._active: list[Entry] = []
        self._kept = KeptRows()

    @property
    def busy(self) -> bool:
        """True while any request waits or runs."""
        return bool(self._waiting or self._active)

    @property
    def waiting(self) -> int:
        """Number of requests that wait."""
        return len(self._waiting)

    def submit(self, entry: Entry) -> None:
        """Append a request to the queue."""
        self._waiting.append(entry)

    def step(self) -> bool:
        """Admit what fits and generate one token for every row. Returns `busy`.

        Raises whatever the model raises, with a note that names the requests it was answering.
        """
        self._drop_cancelled()
        asked: Sequence[Entry] = ()
        try:
            while group := self._next_group():
                asked = group
                self._prefill(group)
                asked = ()
            if self._active:
                asked = self._active
                self._decode()
        except Exception as error:
            names = [entry.name for entry in asked if entry.name]
            if names:
                more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
                add_note(error, f"The model was answering: request {', '.join(names[:NAMED])}{more}")
            raise
        return self.busy

    def _drop_cancelled(self) -> None:
        dropped = [entry for entry in (*self._waiting, *self._active) if entry.cancelled]
        if dropped:
            self._waiting = [entry for entry in self._waiting if not entry.cancelled]
            self._active = [entry for entry in self._active if not entry.cancelled]
            for entry in dropped:
                self._keep(entry)
            self._pack()
            for entry in dropped:
                entry.on_end(None)

    def _next_group(self) -> list[Entry]:
        """The oldest waiting request that fits, and others with about as much to compute."""
        while self._waiting and not self._is_known(self._waiting[0]):
            pass
        free = self.max_rows - self._used_rows()
        if not self._waiting or (self._active and self._waiting[0].job.width > free):
            return []
        window = [entry for entry in self._waiting[: 1 + WINDOW * max(free - 1, 0)] if self._is_known(entry)]
        for entry in window:
            self._find_source(entry)
        oldest = window[0]
        group, longest_rest, total = [oldest], oldest.rest, oldest.rest
        free -= oldest.job.width
        for entry in sorted(window[1:], key=lambda entry: abs(entry.rest - oldest.rest)):
            width, tokens = max(longest_rest, entry.rest), total + entry.rest
            area = tokens if self.decoder.packs else width * (len(group) + 1)
            fits = entry.job.width <= free and area <= self._prefill_tokens and area - tokens <= MAX_PADDING * area
            if fits and not any(_gains_by_waiting(entry, other) for other in group):
                group.append(entry)
                longest_rest, total, free = width, tokens, free - entry.job.width
        self._waiting = [entry for entry in self._waiting if entry not in group]
        return group

    def _is_known(self, entry: Entry) -> bool:
        """Find the images of a waiting request; one that fails leaves the queue."""
        if entry.content is None:
            try:
                entry.found_images = self.image_features.find(entry.images)
                entry.content = content(entry.prompt, entry.found_images)
            except DataError as error:
                self._waiting.remove(entry)
                entry.on_end(error)
                return False
        return True

    def _find_source(self, entry: Entry) -> None:
        """Choose the row that spares most of the prompt. Images are taken whole or not at all."""
        entry.source, entry.start = longest(entry.content, self._contents())
        entry.start, entry.shown = whole_images(entry.prompt, entry.found_images, entry.start)
        if entry.shown and self.decoder.beside_text:  # a row's features come from its own prompt
            entry.start, entry.shown = entry.prompt.index(IMAGE_TOKEN_INDEX), 0
        entry.source = entry.source if entry.start else None

    def _contents(self) -> Iterator[tuple[int, np.ndarray]]:
        yield from ((entry.rows[0], entry.content) for entry in self._active)
        yield from self._kept

    def _prefill(self, group: list[Entry]) -> None:
        group, features = self._with_features(group)
        if not group:
            return
        first = self._used_rows()
        starts, rests = [entry.start for entry in group], [entry.prompt[entry.start :] for entry in group]
        self._make_room(group, first, max(starts) + max(map(len, rests)))
        positions = [entry.positions[:, entry.start :] for entry in group if entry.positions is not None]
        shown = [entry.shown_features for entry in group]
        logits = self.decoder.prefill(rests, features, first, starts, positions or None, shown)
        for index, entry in enumerate(group):
            entry.rows, entry.said, entry.length = [first + index], [[]], len(entry.prompt)
        self._advance(group, logits, first)

    def _with_features(self, group: list[Entry]) -> tuple[list[Entry], list[torch.Tensor | None]]:
        """The entries whose images can be used, and the features of all that are computed, in their order."""
        kept, features = [], []
        # An interaction looks at the images of what another row spares a prompt, too.
        firsts = [0 if self.decoder.interacts else entry.shown for entry in group]
        wanted = [entry.found_images[first:] for entry, first in zip(group, firsts, strict=True)]
        for entry, first, own in zip(group, firsts, self.image_features.features(wanted), strict=True):
            if isinstance(own, DataError):
                entry.on_end(own)
                continue
            kept.append(entry)
            features += [item.projected for item in own[entry.shown - first :]]
            entry.shown_features = [item.shown for item in own] if self.decoder.interacts else []
        return kept, features

    def _make_room(self, group: list[Entry], first: int, length: int) -> None:
        """Reserve the group's rows, from `first` on; what free rows hold there moves to others, and what the group can
        use is copied into its rows."""
        cache, end = self.decoder.cache, first + sum(entry.job.width for entry in group)
        for entry in group:
            if entry.source is not None:
                self._kept.touch(entry.source)
                self._kept.drop_covered(entry.source, entry.content)
        rows = max(end, min(self.max_rows, end + len(self._kept)))
        cache.reserve(rows, max(length, *(entry.max_length for entry in (*self._active, *group))))
        moves = self._kept.make_way(range(first, end), range(end, cache.rows))
        for row, entry in enumerate(group, start=first):
            if entry.source is not None and entry.source != row:
                moves.append((entry.source, row))
        self._copy(moves, max(entry.start for entry in group))

    def _decode(self) -> None:
        pairs = [
            (row, token, entry.length, entry.length + entry.offset, entry.shown_features)
            for entry in self._active
            for row, token in zip(entry.rows, entry.tokens, strict=True)
        ]
        pairs.sort(key=lambda pair: pair[0])
        _, tokens, lengths, positions, shown = map(list, zip(*pairs, strict=True))
        logits = self.decoder.step(tokens, lengths, positions, shown)
        entries, self._active = self._active, []
        for entry in entries:
            entry.length += 1
            for said, token in zip(entry.said, entry.tokens, strict=True):
                said.append(token)
        self._advance(entries, logits, 0)

    def _advance(self, entries: list[Entry], logits: torch.Tensor, first: int) -> None:
        """Hand every entry the logits of its rows (row `first` of the cache is row 0 of `logits`)."""
        likeliest = logits.argmax(-1).tolist()
        on_host = logits.cpu() if any(entry.job.needs_logits for entry in entries) else None
        ended = []
        for entry in entries:
            places = [row - first for row in entry.rows]
            own = on_host[places] if entry.job.needs_logits else None
            try:
                step: NextTokens = entry.job.advance(own, [likeliest[place] for place in places])
            except DataError as error:  # of this request alone
                entry.rows = []
                ended.append((entry, error))
                continue
            if not step.parents:
                self._keep(entry)
                ended.append((entry, None))
                continue
            if step.parents != list(range(len(entry.rows))):
                entry.rows = [entry.rows[parent] for parent in step.parents]
                entry.said = [list(entry.said[parent]) for parent in step.parents]
            entry.tokens = step.tokens
            self._active.append(entry)
        self._pack()
        for entry, error in ended:
            entry.on_end(error)

    def _keep(self, entry: Entry) -> None:
        """Remember what the first row of an entry that leaves holds."""
        if entry.rows:
            self._kept.keep(entry.rows[0], np.concatenate((entry.content, np.array(entry.said[0], dtype=np.int64))))
            entry.rows = []

    def _pack(self) -> None:
        """Give the rows that go on the cache rows 0..R-1: most stay, the others are copied into the gaps, and what the
        gaps hold takes their place."""
        wanted = [(entry, index, row) for entry in self._active for index, row in enumerate(entry.rows)]
        free, moving = set(range(len(wanted))), []
        for entry, index, row in wanted:
            if row in free:
                free.remove(row)
            else:
                moving.append((entry, index, row))
        targets = sorted(free)
        left = sorted({row for _, _, row in moving if row >= len(wanted)})
        moves = self._kept.make_way(targets, left)
        for (entry, index, row), target in zip(moving, targets, strict=True):
            moves.append((row, target))
            entry.rows[index] = target
        self._copy(moves)

    def _copy(self, moves: list[tuple[int, int]], length: int = 0) -> None:
        """Copy whole rows (of at least `length` positions) onto others."""
        length = max([length, self._kept.longest_kept(), *(entry.length for entry in self._active)])
        self.decoder.cache.copy_rows([row for row, _ in moves], [row for _, row in moves], length)

    def _used_rows(self) -> int:
        return sum(len(entry.rows) for entry in self._active)


def _gains_by_waiting(entry: Entry, other: Entry) -> bool:
    """Whether `other`, computed first, spares an entry at least half of its work."""
    return 2 * (common(entry.content[:-1], other.content) - entry.start) >= entry.rest
