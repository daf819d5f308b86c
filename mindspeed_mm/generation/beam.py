"""Beam search with the rules of transformers' generate: which beams run on, which are finished, when to end.

Legend: K beams, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mindspeed_mm.generation.jobs import Generated, NextTokens
from mindspeed_mm.generation.options import GenerationOptions
from mindspeed_mm.generation.rules import AllowedTokens, process_rows
from mindspeed_mm.generation.text import TextStream

OUT = -1.0e9
"""Score of what is no candidate (transformers' constant, which decides ties)."""


@dataclass(frozen=True)
class _Beam:
    """A continuation; extending it makes a new one."""

    ids: list[int] = field(default_factory=list)
    stream: TextStream | None = None
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)

    def extended(self, token: int, logprobs: torch.Tensor, stop_ids: Sequence[int], tops: int | None) -> _Beam:
        """With one more token, whose log-probability stands in `logprobs` [V]."""
        stream = self.stream
        if stream is not None and token not in stop_ids:
            stream = stream.fork()
            stream.add(token)
        own, top = self.logprobs, self.top_logprobs
        if tops is not None:
            best = logprobs.topk(min(tops, logprobs.numel()))
            own = [*own, float(logprobs[token])]
            top = [*top, dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))]
        return _Beam([*self.ids, token], stream, own, top)

    def ends(self, stop_ids: Sequence[int]) -> bool:
        """Whether its last token is a stop id or completes a stop string."""
        return self.ids[-1] in stop_ids or (self.stream is not None and self.stream.stopped)


class BeamJob:
    """The K likeliest continuations of one prompt, searched breadth first."""

    needs_logits = True

    def __init__(
        self,
        prompt: Sequence[int],
        options: GenerationOptions,
        stop_ids: Sequence[int],
        stream: TextStream | None = None,
        allowed: AllowedTokens | None = None,
    ) -> None:
        """`stream` knows the stop strings and is needed for them only; `allowed` says which tokens may follow the ids
        of prompt and answer."""
        self._allowed = allowed
        self._prompt, self._options, self._stop_ids = list(prompt), options, sorted(set(stop_ids))
        self.width = options.num_beams
        self._running = [_Beam(stream=stream)] * self.width
        self._running_scores = torch.full((self.width,), OUT)
        self._running_scores[0] = 0.0  # all beams are the prompt: only one may be continued
        self._finished = [_Beam(stream=stream)] * self.width
        self._finished_scores = torch.full((self.width,), OUT)
        self._is_finished = torch.zeros(self.width, dtype=torch.bool)
        self._improvable = True

    @property
    def sequences(self) -> list[Generated]:
        """The num_return_sequences best finished beams, best first."""
        best = []
        for beam, score in zip(self._finished, self._finished_scores.tolist(), strict=True):
            reason = "cancelled" if not beam.ids else "stop" if beam.ends(self._stop_ids) else "length"
            stream = beam.stream.fork() if beam.stream is not None else None
            if stream is not None:
                stream.finish()
            best.append(Generated(list(beam.ids), reason, score, beam.logprobs, beam.top_logprobs, stream))
        return best[: self._options.num_return_sequences]

    def advance(self, logits: torch.Tensor | None, likeliest: Sequence[int]) -> NextTokens:
        """See GenerationJob."""
        logprobs = logits.log_softmax(-1)
        scores, origins, tokens = self._candidates(logprobs)
        parents = [0 if len(logprobs) == 1 else origin for origin in origins]
        candidates = [
            self._running[origin].extended(token, logprobs[parent], self._stop_ids, self._options.logprobs)
            for origin, parent, token in zip(origins, parents, tokens, strict=True)
        ]
        length = len(candidates[0].ids)
        full = length == self._options.max_new_tokens
        hits = torch.tensor([full or beam.ends(self._stop_ids) for beam in candidates])
        running = scores + hits * OUT
        chosen = running.topk(self.width).indices
        self._update_finished(candidates, scores, hits, length)
        self._running = [candidates[i] for i in chosen.tolist()]
        self._running_scores = running[chosen]
        self._improvable = self._improvable and self._may_improve(length)
        full_house = bool(self._is_finished.all()) and self._options.early_stopping is True
        if not self._improvable or full_house or bool(hits.all()):
            return NextTokens([], [])
        return NextTokens([parents[i] for i in chosen.tolist()], [tokens[i] for i in chosen.tolist()])

    def _candidates(self, logprobs: torch.Tensor) -> tuple[torch.Tensor, list[int], list[int]]:
        """Scores, beams and tokens of the likeliest continuations, enough that stop ids cannot end all of them."""
        rows = logprobs if len(logprobs) > 1 else logprobs.expand(self.width, -1)
        said = [[*self._prompt, *beam.ids] for beam in self._running]
        generated = len(self._running[0].ids)
        rows = process_rows(rows, said, generated, self._options, self._stop_ids, self._allowed)
        total = (rows + self._running_scores[:, None]).flatten()
        keep = min(max(2, 1 + len(self._stop_ids)) * self.width, total.numel())
        best = total.topk(keep)
        vocabulary = logprobs.shape[-1]
        return best.values, (best.indices // vocabulary).tolist(), (best.indices % vocabulary).tolist()

    def _update_finished(self, candidates: list[_Beam], scores: torch.Tensor, hits: torch.Tensor, length: int) -> None:
        """Keep the K best finished beams; only the K likeliest candidates may finish."""
        done = hits.clone()
        done[self.width :] = False
        final = scores / length**self._options.length_penalty
        if bool(self._is_finished.all()) and self._options.early_stopping is True:
            final = final + OUT
        if not self._improvable:
            final = final + OUT
        final = final + (~done) * OUT
        merged = torch.cat((self._finished_scores, final))
        best = merged.topk(self.width).indices
        beams = self._finished + candidates
        self._finished = [beams[i] for i in best.tolist()]
        self._finished_scores = merged[best]
        self._is_finished = torch.cat((self._is_finished, done))[best]

    def _may_improve(self, length: int) -> bool:
        """Whether the best running beam may still beat the worst finished one."""
        penalty = self._options.length_penalty
        longest = self._options.early_stopping == "never" and penalty > 0
        best = self._running_scores[0] / (self._options.max_new_tokens if longest else length) ** penalty
        worst = torch.where(self._is_finished, self._finished_scores.min(), torch.tensor(OUT))
        return bool((best > worst).any())
