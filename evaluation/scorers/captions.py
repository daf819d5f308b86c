"""BLEU (Papineni et al., ACL 2002) and CIDEr-D (Vedantam et al., CVPR 2015) of captions, as pycocoevalcap 1.2 counts.

That package finds words with a program in Java. `caption_words` finds the same ones by rules of its own in ordinary
captions: clitics are words (is n't, dog 's), marks are no words, brackets become -lrb- and the like, and a period stays
on an abbreviation (mr., p.m.) and inside a word. It differs for rare forms, such as c++ or 'em.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from evaluation.scorers.text import strip_special_tokens

ORDERS = 4
"""Runs of 1 to 4 words are compared."""
SIGMA = 6.0
"""Width of CIDEr-D's penalty for another length, in words."""
CIDER_SCALE = 10.0
SMALL, TINY = 1e-9, 1e-15
"""What the public BLEU adds below and above the line instead of asking whether a count is zero."""

NO_WORDS = frozenset(["'", "''", "`", "``", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"])
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PAIRS = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "wanna": ("wan", "na"),
    "gimme": ("gim", "me"),
    "lemme": ("lem", "me"),
    "'tis": ("'t", "is"),
    "'twas": ("'t", "was"),
    "y'all": ("y'", "all"),
}
_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2026": "...", "\u2013": "-"})
_TOKEN = re.compile(
    r"""\.\.+ | --+ | [?!]+                                    # dots, dashes, cries
    | '\d0s\b | 't(?:is|was)\b | 'n'                           # the '90s, 'tis, rock 'n' roll
    | (?:[a-z]\.){2,}                                          # p.m., u.s.
    | \b(?:mr|mrs|ms|dr|st|jr|sr|vs|prof|ave|blvd|etc|mt)\.    # abbreviations
    | \d+:\d+ | \d+(?:,\d{3})+(?:\.\d+)? | <[^<>\s]+> | @\w+   # 5:30, 1,000, <c>, @home
    | \w+(?:(?:[-/.] | '(?=[^\W\d]))\w+)*                      # t-shirt, 1/2, o'clock
    | \S""",
    re.VERBOSE,
)
_CLITIC = re.compile(r"(.+?)(n't|'(?:s|re|ve|ll|d|m))")

Ngram = tuple[str, ...]


def caption_words(text: str) -> list[str]:
    """The words of a caption, lower case, without punctuation."""
    words: list[str] = []
    for token in _TOKEN.findall(strip_special_tokens(text).translate(_QUOTES).lower()):
        clitic = _CLITIC.fullmatch(token)
        words += _PAIRS.get(token) or (clitic.groups() if clitic else (BRACKETS.get(token, token),))
    return [word for word in words if word not in NO_WORDS and not re.fullmatch(r"\.\.+|--+", word)]


class Caption(NamedTuple):
    """An answer and what people wrote of the same image, as words."""

    words: Sequence[str]
    references: Sequence[Sequence[str]]


@dataclass(frozen=True)
class CaptionScores:
    """Scores of a whole set, BLEU 0..1, CIDEr 0..10."""

    bleu: tuple[float, ...]
    """Of runs up to 1, 2, 3 and 4 words; of the set, not a mean over images."""
    cider: float
    """The mean of `ciders`."""
    ciders: tuple[float, ...]
    """Of each image; how rare words are is counted over the references of the whole set."""


def caption_scores(captions: Sequence[Caption]) -> CaptionScores:
    """Score a set of captions. Raises ValueError for an empty set and for a caption without references."""
    if not captions or not all(caption.references for caption in captions):
        raise ValueError(f"found {len(captions)} captions; expected at least one, each with a reference or more.")
    ciders = _ciders(captions)
    return CaptionScores(_bleus(captions), sum(ciders) / len(ciders), ciders)


def _bleus(captions: Sequence[Caption]) -> tuple[float, ...]:
    """Clipped precision of the set's runs, with the length of the nearest reference (the shorter of two) against
    answers that are too short."""
    length = wanted = 0
    right, runs = [0] * ORDERS, [0] * ORDERS
    for words, references in captions:
        size = len(words)
        length += size
        wanted += min((abs(len(reference) - size), len(reference)) for reference in references)[1]
        most: Counter[Ngram] = Counter()
        for reference in references:
            most |= _ngrams(reference)
        for ngram, count in _ngrams(words).items():
            right[len(ngram) - 1] += min(count, most[ngram])
        for order in range(ORDERS):
            runs[order] += max(0, size - order)
    ratio = (length + TINY) / (wanted + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, found = 1.0, []
    for order in range(ORDERS):
        product *= (right[order] + TINY) / (runs[order] + SMALL)
        found.append(product ** (1 / (order + 1)) * brevity)
    return tuple(found)


def _ciders(captions: Sequence[Caption]) -> tuple[float, ...]:
    """Mean over the orders and references of the cosine between runs weighted by how rare they are; clipped, and less
    where lengths differ."""
    images: Counter[Ngram] = Counter()
    counted = [[_ngrams(reference) for reference in caption.references] for caption in captions]
    for references in counted:
        images.update({ngram for reference in references for ngram in reference})
    total = math.log(len(captions))
    found = []
    for (words, _), references in zip(captions, counted, strict=True):
        own = _weighted(_ngrams(words), images, total)
        likeness = sum(_likeness(own, _weighted(reference, images, total)) for reference in references)
        found.append(CIDER_SCALE * likeness / ORDERS / len(references))
    return tuple(found)


class _Weighted(NamedTuple):
    vectors: tuple[dict[Ngram, float], ...]
    norms: tuple[float, ...]
    length: int
    """Runs of two words, which stand for the length of the caption."""


def _weighted(ngrams: Mapping[Ngram, int], images: Mapping[Ngram, int], total: float) -> _Weighted:
    vectors: tuple[dict[Ngram, float], ...] = tuple({} for _ in range(ORDERS))
    length = 0
    for ngram, count in ngrams.items():
        vectors[len(ngram) - 1][ngram] = count * (total - math.log(max(1, images.get(ngram, 0))))
        length += count if len(ngram) == 2 else 0
    norms = tuple(math.sqrt(sum(value * value for value in vector.values())) for vector in vectors)
    return _Weighted(vectors, norms, length)


def _likeness(own: _Weighted, other: _Weighted) -> float:
    """Sum over the orders."""
    total = 0.0
    for vector, reference, norm, norm_of_reference in zip(
        own.vectors, other.vectors, own.norms, other.norms, strict=True
    ):
        product = sum(
            min(value, reference.get(ngram, 0.0)) * reference.get(ngram, 0.0) for ngram, value in vector.items()
        )
        total += product / (norm * norm_of_reference) if norm and norm_of_reference else product
    return total * math.exp(-((own.length - other.length) ** 2) / (2 * SIGMA**2))


def _ngrams(words: Sequence[str]) -> Counter[Ngram]:
    return Counter(
        tuple(words[start : start + order]) for order in range(1, ORDERS + 1) for start in range(len(words) - order + 1)
    )
