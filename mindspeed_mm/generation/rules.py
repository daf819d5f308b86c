"""What may come next, and how likely: the rules of transformers' logits processors, in transformers' order.

Legend: V vocabulary, R rows (the beams of one request, or one sequence).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import torch

from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.generation.options import GenerationOptions

AllowedTokens = Callable[[torch.Tensor], Sequence[int]]
"""From the ids of prompt and answer [S] int64 to the tokens that may follow."""

PrefixAllowedTokens = Callable[[int, torch.Tensor], Sequence[int]]
"""transformers' prefix_allowed_tokens_fn: (number of the prompt in the call, its ids and the answer's [S] int64) ->
tokens that may follow."""


def bound(allowed: PrefixAllowedTokens | None, index: int) -> AllowedTokens | None:
    """What a prefix_allowed_tokens_fn allows behind prompt `index`."""
    return None if allowed is None else functools.partial(allowed, index)


def is_plain(options: GenerationOptions) -> bool:
    """True where the likeliest token is always right, whatever was generated before, and nothing else is asked for."""
    return options.greedy and options.num_beams == 1 and not options.ruled and options.logprobs is None


def check_ids(options: GenerationOptions, vocabulary: int) -> None:
    """Raise ConfigError where an option names a token that the model does not have."""
    eos = options.forced_eos_token_id
    named: dict[str, Iterable[int]] = {
        "sequence_bias": [i for ids, _ in options.sequence_bias or () for i in ids],
        "bad_words_ids": [i for ids in options.bad_words_ids or () for i in ids],
        "suppress_tokens": options.suppress_tokens or (),
        "begin_suppress_tokens": options.begin_suppress_tokens or (),
        "forced_bos_token_id": () if options.forced_bos_token_id is None else (options.forced_bos_token_id,),
        "forced_eos_token_id": () if eos is None else eos if isinstance(eos, list) else (eos,),
    }
    for name, ids in named.items():
        beyond = sorted({i for i in ids if i >= vocabulary})
        if beyond:
            raise ConfigError(
                f"{name}: found token {beyond[0]}; the model has 0 to {vocabulary - 1}. Use ids of its own"
            )


def process(
    scores: torch.Tensor,
    history: Sequence[int],
    generated: int,
    options: GenerationOptions,
    stop_ids: Sequence[int],
    allowed: AllowedTokens | None = None,
) -> torch.Tensor:
    """`process_rows` for the scores [V] and the history of one sequence; returns [V]."""
    return process_rows(scores[None], [history], generated, options, stop_ids, allowed)[0]


def process_rows(
    scores: torch.Tensor,
    histories: Sequence[Sequence[int]],
    generated: int,
    options: GenerationOptions,
    stop_ids: Sequence[int],
    allowed: AllowedTokens | None = None,
) -> torch.Tensor:
    """Apply the rules to the rows of one request.

    Args:
        scores: [R, V] float32 logits (log-probabilities in beam search).
        histories: R lists of the ids of prompt and answer; ids outside 0..V-1 stand for no token.
        generated: how many of them are the answer's.
        allowed: the only tokens that may follow.

    Returns:
        [R, V] float32, a new tensor where anything changed.

    Raises:
        DataError: `allowed` names no token, or one that the model does not have; no row has a token left.
    """
    if options.ruled:
        pairs = zip(scores, histories, strict=True)
        scores = torch.stack([_by_history(row, history, generated, options, stop_ids) for row, history in pairs])
    if allowed is not None:
        scores = _only_allowed(scores, histories, allowed)
    if options.ruled:
        scores = _by_place(scores, len(histories[0]), generated, options, stop_ids)
    dead = (scores == -torch.inf).all(-1)
    if bool(dead.all()) and (options.ruled or allowed is not None):
        raise DataError(
            "the options forbid every next token: expected at least one that bad_words_ids, suppress_tokens, "
            "no_repeat_ngram_size, prefix_allowed_tokens_fn and the like leave. Loosen them"
        )
    if not (options.renormalize_logits and options.greedy):  # sampling does it after its own cuts
        return scores
    # A beam without a token left stays out of the search: its log-probabilities would be NaN. So would those beside a
    # score that a penalty has driven to infinity.
    finite = scores.clamp(max=torch.finfo(scores.dtype).max)
    return torch.where(dead[:, None], scores, finite.log_softmax(-1))


def _by_history(
    scores: torch.Tensor, history: Sequence[int], generated: int, options: GenerationOptions, stop_ids: Sequence[int]
) -> torch.Tensor:
    """The rules that look at what was said before: [V] -> [V]."""
    prompt = history[: len(history) - generated]
    if options.sequence_bias:
        scores = _biased(scores, history, {tuple(ids): bias for ids, bias in options.sequence_bias})
    if options.encoder_repetition_penalty != 1.0:
        scores = _penalised(scores, prompt, 1 / options.encoder_repetition_penalty)
    if options.repetition_penalty != 1.0:
        scores = _penalised(scores, history, options.repetition_penalty)
    if options.no_repeat_ngram_size:
        scores = _forbid(scores, repeating_tokens(history, options.no_repeat_ngram_size))
    if options.encoder_no_repeat_ngram_size:
        scores = _forbid(scores, repeating_tokens(history, options.encoder_no_repeat_ngram_size, prompt))
    if options.bad_words_ids:
        words = [tuple(ids) for ids in options.bad_words_ids if not (len(ids) == 1 and ids[0] in stop_ids)]
        scores = _biased(scores, history, dict.fromkeys(words, -torch.inf))
    if len(history) < options.min_length or generated < options.min_new_tokens:
        scores = _forbid(scores, stop_ids)
    return scores


def _only_allowed(scores: torch.Tensor, histories: Sequence[Sequence[int]], allowed: AllowedTokens) -> torch.Tensor:
    """[R, V] with -inf for all other tokens. Where every row forbids its allowed ones, the allowed ones win."""
    mask = torch.full_like(scores, -torch.inf)
    for row, history in zip(mask, histories, strict=True):
        ids = [int(i) for i in allowed(torch.tensor(history, dtype=torch.int64))]
        if not ids:
            raise DataError(
                "prefix_allowed_tokens_fn gave no token that may follow; expected at least one. Allow the stop id "
                "where an answer may end"
            )
        if not 0 <= min(ids) <= max(ids) < scores.shape[-1]:
            raise DataError(
                f"prefix_allowed_tokens_fn gave tokens {min(ids)} to {max(ids)}; the model has 0 to "
                f"{scores.shape[-1] - 1}. Use ids of its own"
            )
        row[ids] = 0.0
    left = scores + mask
    return mask if bool((left == -torch.inf).all()) else left


def _by_place(
    scores: torch.Tensor, length: int, generated: int, options: GenerationOptions, stop_ids: Sequence[int]
) -> torch.Tensor:
    """The rules that look at how much was said: [R, V] -> [R, V]."""
    if options.forced_bos_token_id is not None and length == 1:
        scores = _forced(scores, [options.forced_bos_token_id])
    if options.forced_eos_token_id is not None and generated == options.max_new_tokens - 1:
        eos = options.forced_eos_token_id
        scores = _forced(scores, eos if isinstance(eos, list) else [eos])
    if options.remove_invalid_values:
        limits = torch.finfo(scores.dtype)
        scores = scores.nan_to_num(nan=0.0, posinf=limits.max, neginf=limits.min)
    if options.exponential_decay_length_penalty is not None:
        start, factor = options.exponential_decay_length_penalty
        if generated > start:
            index = _places(stop_ids, scores.shape[-1])
            values = scores[:, index]
            gain = (values.abs() * (factor ** (generated - start) - 1)).masked_fill(~values.isfinite(), 0.0)
            scores = scores.index_copy(1, index, values + gain)
    if options.suppress_tokens:
        scores = _forbid(scores, options.suppress_tokens)
    first = 1 if length - generated == 1 and options.forced_bos_token_id is not None else 0
    if options.begin_suppress_tokens and generated == first:
        scores = _forbid(scores, options.begin_suppress_tokens)
    return scores


def repeating_tokens(history: Sequence[int], size: int, said: Sequence[int] | None = None) -> set[int]:
    """Tokens behind `history` that would complete a run of `size` tokens that `said` (None: history) holds."""
    if len(history) + 1 < size:
        return set()
    said = history if said is None else said
    tail = list(history[len(history) - size + 1 :])
    starts = range(len(said) - size + 1)
    return {said[start + size - 1] for start in starts if list(said[start : start + size - 1]) == tail}


def _penalised(scores: torch.Tensor, ids: Iterable[int], penalty: float) -> torch.Tensor:
    """Divide the positive and multiply the negative scores of these tokens."""
    index = _places(ids, scores.numel())
    values = scores[index]
    return scores.index_copy(0, index, torch.where(values < 0, values * penalty, values / penalty))


def _biased(scores: torch.Tensor, history: Sequence[int], biases: dict[tuple[int, ...], float]) -> torch.Tensor:
    """Add its bias to each token that completes one of the sequences."""
    tokens, values = [], []
    for ids, bias in biases.items():
        before = len(ids) - 1
        if not before or (before <= len(history) and list(history[len(history) - before :]) == list(ids[:-1])):
            tokens.append(ids[-1])
            values.append(bias)
    index = torch.tensor(tokens, dtype=torch.int64)
    return scores + torch.zeros_like(scores).index_add_(0, index, torch.tensor(values, dtype=scores.dtype))


def _forced(scores: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    index = torch.tensor(list(ids), dtype=torch.int64)
    return torch.full_like(scores, -torch.inf).index_fill(-1, index, 0.0)


def _forbid(scores: torch.Tensor, ids: Iterable[int]) -> torch.Tensor:
    return scores.index_fill(-1, _places(ids, scores.shape[-1]), -torch.inf)


def _places(ids: Iterable[int], vocabulary: int) -> torch.Tensor:
    return torch.tensor(sorted({i for i in ids if 0 <= i < vocabulary}), dtype=torch.int64)
