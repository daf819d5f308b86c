"""Beam search with the rules of transformers' generate: which beams run on, which are finished, when to end.

Legend: K beams, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mindspeed_mm.generation.jobs import Generated, Step
from mindspeed_mm.generation.options import GenerationOptions
from mindspeed_mm.generation.sampling import process

OUT = -1.0e9
"""Score of what is no candidate (transformers' constant, which decides ties)."""


class BeamJob:
    """The K likeliest continuations of one prompt, searched breadth first."""

    needs_logits = True

    def __init__(self, prompt: Sequence[int], options: GenerationOptions, stop_ids: Sequence[int]) -> None:
        self._prompt, self._options, self._stop_ids = list(prompt), options, sorted(set(stop_ids))
        self.width = options.num_beams
        self._running: list[list[int]] = [[] for _ in range(self.width)]
        self._running_scores = torch.full((self.width,), OUT)
        self._running_scores[0] = 0.0  # all beams are the prompt: only one may be continued
        self._finished: list[list[int]] = [[] for _ in range(self.width)]
        self._finished_scores = torch.full((self.width,), OUT)
        self._is_finished = torch.zeros(self.width, dtype=torch.bool)
        self._improvable = True

    @property
    def sequences(self) -> list[Generated]:
        """The num_return_sequences best finished beams, best first."""
        best = []
        for ids, score in zip(self._finished, self._finished_scores.tolist(), strict=True):
            reason = "stop" if ids and ids[-1] in self._stop_ids else "length" if ids else "cancelled"
            best.append(Generated(list(ids), reason, score))
        return best[: self._options.num_return_sequences]

    def advance(self, logits: torch.Tensor | None, likeliest: Sequence[int]) -> Step:
        """See Job."""
        scores, parents, tokens = self._candidates(logits)
        length = len(self._running[0]) + 1
        candidates = [[*self._running[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        full = length == self._options.max_new_tokens
        hits = torch.tensor([full or token in self._stop_ids for token in tokens])
        running = scores + hits * OUT
        chosen = running.topk(self.width).indices
        self._update_finished(candidates, scores, hits, length)
        self._running = [candidates[i] for i in chosen.tolist()]
        self._running_scores = running[chosen]
        self._improvable = self._improvable and self._may_improve(length)
        full_house = bool(self._is_finished.all()) and self._options.early_stopping is True
        if not self._improvable or full_house or bool(hits.all()):
            return Step([], [])
        return Step([parents[i] for i in chosen.tolist()], [tokens[i] for i in chosen.tolist()])

    def _candidates(self, logits: torch.Tensor) -> tuple[torch.Tensor, list[int], list[int]]:
        """Scores, parent rows and tokens of the likeliest continuations, enough that K of them cannot end."""
        logprobs = logits.log_softmax(-1)
        first = len(logits) == 1
        rows = []
        for index, ids in enumerate(self._running):
            row = logprobs[0 if first else index]
            rows.append(process(row, [*self._prompt, *ids], len(ids), self._options, self._stop_ids))
        total = (torch.stack(rows) + self._running_scores[:, None]).flatten()
        keep = min(max(2, 1 + len(self._stop_ids)) * self.width, total.numel())
        best = total.topk(keep)
        vocabulary = logits.shape[-1]
        parents = (best.indices // vocabulary).tolist()
        return best.values, [0 if first else p for p in parents], (best.indices % vocabulary).tolist()

    def _update_finished(
        self, candidates: list[list[int]], scores: torch.Tensor, hits: torch.Tensor, length: int
    ) -> None:
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
        sequences = self._finished + candidates
        self._finished = [sequences[i] for i in best.tolist()]
        self._finished_scores = merged[best]
        self._is_finished = torch.cat((self._is_finished, done))[best]

    def _may_improve(self, length: int) -> bool:
        """Whether the best running beam may still beat the worst finished one."""
        penalty = self._options.length_penalty
        longest = self._options.early_stopping == "never" and penalty > 0
        best = self._running_scores[0] / (self._options.max_new_tokens if longest else length) ** penalty
        worst = torch.where(self._is_finished, self._finished_scores.min(), torch.tensor(OUT))
        return bool((best > worst).any())
