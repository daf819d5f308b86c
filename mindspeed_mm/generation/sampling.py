"""From logits to a token: the rules of transformers' logits processors, in transformers' order, for one sequence.

Legend: V vocabulary, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mindspeed_mm.errors import DataError
from mindspeed_mm.generation.options import GenerationOptions


def is_plain(options: GenerationOptions) -> bool:
    """True where the likeliest token is always right, whatever was generated before, and nothing else is asked for."""
    return (
        options.greedy
        and options.num_beams == 1
        and options.repetition_penalty == 1.0
        and options.no_repeat_ngram_size == 0
        and options.min_new_tokens == 0
        and options.logprobs is None
    )


def process(
    scores: torch.Tensor, history: Sequence[int], generated: int, options: GenerationOptions, stop_ids: Sequence[int]
) -> torch.Tensor:
    """Apply the rules that look at what was said before.

    Args:
        scores: [V] float32 logits (log-probabilities in beam search).
        history: ids of prompt and answer; ids outside 0..V-1 are passed over.
        generated: how many of them are the answer's.

    Returns:
        [V] float32, a new tensor where anything changed.
    """
    if options.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({i for i in history if 0 <= i < scores.numel()}), dtype=torch.int64)
        values = scores[seen]
        penalty = options.repetition_penalty
        scores = scores.index_put((seen,), torch.where(values < 0, values * penalty, values / penalty))
    if options.no_repeat_ngram_size:
        scores = _forbid(scores, repeating_tokens(history, options.no_repeat_ngram_size))
    if generated < options.min_new_tokens:
        scores = _forbid(scores, stop_ids)
    return scores


def repeating_tokens(history: Sequence[int], size: int) -> set[int]:
    """Tokens that would complete a run of `size` tokens that `history` already holds."""
    if len(history) + 1 < size:
        return set()
    tail = list(history[len(history) - size + 1 :])
    starts = range(len(history) - size + 1)
    return {history[start + size - 1] for start in starts if list(history[start : start + size - 1]) == tail}


def _forbid(scores: torch.Tensor, ids: Sequence[int] | set[int]) -> torch.Tensor:
    index = torch.tensor(sorted(i for i in ids if 0 <= i < scores.numel()), dtype=torch.int64)
    return scores.index_fill(0, index, -torch.inf)


def warp(scores: torch.Tensor, options: GenerationOptions) -> torch.Tensor:
    """Temperature, then top-k, then top-p, then min-p: [V] float32 -> [V] with -inf where a token is out."""
    if options.temperature is not None and options.temperature != 1.0:
        scores = scores / options.temperature
    if options.top_k:
        kth = scores.topk(min(options.top_k, scores.numel())).values[-1]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    if options.top_p is not None and options.top_p < 1.0:
        ordered, order = scores.sort()
        out = ordered.softmax(-1).cumsum(-1) <= 1 - options.top_p
        out[-1] = False
        scores = scores.index_fill(0, order[out], -torch.inf)
    if options.min_p:
        probabilities = scores.softmax(-1)
        scores = scores.masked_fill(probabilities < options.min_p * probabilities.max(), -torch.inf)
    return scores


def pick_token(scores: torch.Tensor, options: GenerationOptions, generator: torch.Generator) -> int:
    """Choose a token from processed scores [V] float32 on the CPU; `generator` is the sequence's own.

    Raises:
        DataError: there are no probabilities to draw with.
    """
    if options.greedy:
        return int(scores.argmax())
    probabilities = warp(scores, options).softmax(-1)
    if not probabilities.isfinite().all():
        raise DataError(
            f"the next token has no finite probabilities: temperature {options.temperature} and repetition_penalty "
            f"{options.repetition_penalty} take the scores beyond float32, or the weights give NaN; expected a "
            "temperature of 0 or some tenths and a penalty near 1"
        )
    return int(torch.multinomial(probabilities, 1, generator=generator))
