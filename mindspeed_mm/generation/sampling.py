"""From processed scores to a token: transformers' warpers, in transformers' order, for one sequence.

Legend: V vocabulary.
"""

from __future__ import annotations

import torch

from mindspeed_mm.errors import DataError
from mindspeed_mm.generation.options import GenerationOptions

TOP_H_TOKENS = 100
"""Tokens whose entropy top_h looks at (transformers' constant)."""


def warp(scores: torch.Tensor, options: GenerationOptions) -> torch.Tensor:
    """Temperature and the options that cut off unlikely tokens: [V] float32 -> [V] with -inf where a token is out."""
    if options.temperature is not None and options.temperature != 1.0:
        scores = scores / options.temperature
    if options.top_h is not None:
        scores = _top_h(scores, options.top_h)
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
    if options.typical_p is not None and options.typical_p < 1.0:
        scores = _typical(scores, options.typical_p)
    if options.epsilon_cutoff:
        scores = _at_least(scores, torch.tensor(options.epsilon_cutoff))
    if options.eta_cutoff:
        epsilon = torch.tensor(options.eta_cutoff)
        logprobs = scores.log_softmax(-1)
        # A token that is out has no share in the entropy; the clamp keeps 0 * inf from becoming NaN.
        entropy = -(logprobs.exp() * logprobs.clamp(min=torch.finfo(scores.dtype).min)).sum()
        scores = _at_least(scores, torch.minimum(epsilon, epsilon.sqrt() * torch.exp(-entropy)))
    return scores.log_softmax(-1) if options.renormalize_logits else scores


def _at_least(scores: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Tokens of at least this probability, and always the likeliest."""
    return scores.masked_fill((scores.softmax(-1) < least) & (scores < scores.max()), -torch.inf)


def _typical(scores: torch.Tensor, mass: float) -> torch.Tensor:
    """The tokens whose information is nearest to the entropy, until they hold this much probability."""
    logprobs = scores.log_softmax(-1)
    entropy = -(logprobs * logprobs.exp()).nansum(-1)
    distance = (-logprobs - entropy).abs()
    ordered, order = distance.sort()
    reached = scores[order].softmax(-1).cumsum(-1) < mass
    last = min(int(reached.sum()), scores.numel() - 1)
    return scores.masked_fill(distance > ordered[last], -torch.inf)


def _top_h(scores: torch.Tensor, share: float) -> torch.Tensor:
    """The likeliest tokens that hold this share of the entropy of the first hundred, and always the likeliest."""
    best = scores.topk(min(TOP_H_TOKENS, scores.numel()))
    spread = torch.distributions.Categorical(logits=best.values)
    held = (-spread.probs * spread.probs.log()).cumsum(-1)
    kept = held <= spread.entropy() * share
    kept[0] = True
    return torch.full_like(scores, -torch.inf).index_copy(0, best.indices[kept], scores[best.indices[kept]])


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
