"""One request's way through the decoding loop, without model and cache: which tokens its rows take next.

A job has one row a sequence that is still growing. Each step it sees its rows' logits and answers with the rows that go
on: row i continues row `parents[i]` of before with `tokens[i]`.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch

from mindspeed_mm.generation.options import GenerationOptions
from mindspeed_mm.generation.rules import AllowedTokens, is_plain, process
from mindspeed_mm.generation.sampling import pick_token
from mindspeed_mm.generation.text import TextStream

SEED_STEP = 0x9E3779B97F4A7C15
"""Parts the seeds of a request's sequences: 2**64 over the golden ratio, as in SplitMix64."""

FinishReason = Literal["stop", "length", "cancelled"]


class NextTokens(NamedTuple):
    """The rows that go on."""

    parents: list[int]
    tokens: list[int]


@dataclass
class Generated:
    """A sequence that was or is generated. `token_ids` include the stop id."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "cancelled"
    score: float | None = None
    """Beam search: the sum of log-probabilities over length ** length_penalty."""
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    stream: TextStream | None = None


class GenerationJob(Protocol):
    """What the scheduler asks of a request."""

    width: int
    """Rows it may need at most."""
    needs_logits: bool
    """False where the likeliest tokens are all it looks at."""
    sequences: list[Generated]
    """The results, best first."""

    def advance(self, logits: torch.Tensor | None, likeliest: Sequence[int]) -> NextTokens:
        """Take the logits [R, V] float32 on the CPU (None unless needs_logits) and the likeliest tokens [R] of its
        rows.

        The first call has one row, the prompt's. A step without rows ends the job.
        """


class SampleJob:
    """Greedy decoding or sampling of one or several sequences that do not depend on each other."""

    def __init__(
        self,
        prompt: Sequence[int],
        options: GenerationOptions,
        stop_ids: Sequence[int],
        streams: Sequence[TextStream] | None = None,
        on_text: Callable[[str, int], None] | None = None,
        allowed: AllowedTokens | None = None,
    ) -> None:
        """`allowed` says which tokens may follow the ids of prompt and answer."""
        self._allowed = allowed
        self._prompt, self._options, self._stop_ids = list(prompt), options, frozenset(stop_ids)
        self._on_text = on_text
        self.width = options.num_return_sequences
        self.needs_logits = allowed is not None or not is_plain(options)
        self.sequences = [Generated(stream=streams[i] if streams else None) for i in range(self.width)]
        self._live = list(range(self.width))
        self._generators = [torch.Generator().manual_seed(_seed(options.seed, i)) for i in self._live]

    def advance(self, logits: torch.Tensor | None, likeliest: Sequence[int]) -> NextTokens:
        """See GenerationJob."""
        step, live = NextTokens([], []), []
        for position, index in enumerate(self._live):
            row = min(position, len(likeliest) - 1)  # the first call has one row for all sequences
            token = self._choose(index, logits[row]) if logits is not None else likeliest[row]
            if self._take(index, token):
                live.append(index)
                step.parents.append(row)
                step.tokens.append(token)
        self._live = live
        return step

    def _choose(self, index: int, logits: torch.Tensor) -> int:
        sequence = self.sequences[index]
        history = [*self._prompt, *sequence.token_ids]
        stop_ids, generated = sorted(self._stop_ids), len(sequence.token_ids)
        scores = process(logits, history, generated, self._options, stop_ids, self._allowed)
        token = pick_token(scores, self._options, self._generators[index])
        if self._options.logprobs is not None:
            logprobs = logits.log_softmax(-1)
            sequence.logprobs.append(float(logprobs[token]))
            best = logprobs.topk(min(self._options.logprobs, logprobs.numel()))
            sequence.top_logprobs.append(dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
        return token

    def _take(self, index: int, token: int) -> bool:
        """Append a token; True where the sequence goes on."""
        sequence = self.sequences[index]
        sequence.token_ids.append(token)
        stopped = token in self._stop_ids
        piece = ""
        if sequence.stream is not None and not stopped:
            piece = sequence.stream.add(token)
            stopped = sequence.stream.stopped
        full = len(sequence.token_ids) == self._options.max_new_tokens
        if stopped or full:
            sequence.finish_reason = "stop" if stopped else "length"
            piece += sequence.stream.finish() if sequence.stream is not None else ""
        if piece and self._on_text is not None:
            self._on_text(piece, index)
        return not (stopped or full)


def _seed(seed: int, index: int) -> int:
    return (seed + index * SEED_STEP) % 2**63
