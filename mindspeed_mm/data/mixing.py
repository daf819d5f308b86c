"""How several sets make an epoch: concatenated, interleaved, a part of one, or shuffled portions of some.

A mix is a tree. Its leaves are sets, its nodes make one list of samples out of several. The lists follow from the
sizes of the sets and the seeds in data.json alone, so that all ranks, workers and resumed runs have the same ones.
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Union

import numpy as np
import pydantic

from mindspeed_mm.config.load import StrictModel
from mindspeed_mm.errors import ConfigError

DRAWN_AT_ONCE = 1000
"""Sources are drawn in blocks of so many, as in `datasets`: another size would give another sequence."""

OPTIONS = {
    "concat": (),
    "interleave": ("probabilities", "seed", "stopping_strategy"),
    "subset": ("portion", "shuffle", "seed"),
    "shuffled_concat": ("portion", "seed"),
}
"""The nodes of a mix and the options that each of them reads."""

DEFAULT_SEED = 42

Stop = Literal["first_exhausted", "all_exhausted"]


def _form(value: Any) -> str | None:
    """Which form of a part is given; it stands in the path of errors."""
    forms = {int: "number", str: "name", dict: "mix", Mix: "mix"}
    return forms.get(type(value))


Part = Annotated[
    Union[  # noqa: UP007 - `|` does not take a name that is defined below
        Annotated[pydantic.NonNegativeInt, pydantic.Tag("number")],
        Annotated[str, pydantic.Tag("name")],
        Annotated["Mix", pydantic.Tag("mix")],
    ],
    pydantic.Discriminator(
        _form,
        custom_error_type="part_of_a_mix",
        custom_error_message='expected the number of a set, its name, or an object such as {{"concat": [0, 1]}}',
    ),
]
"""A set (its number in basic_parameters from 0, or its name), or a mix."""

Parts = Annotated[tuple[Part, ...], pydantic.Field(min_length=1)]


class Mix(StrictModel):
    """One node: exactly one of `concat`, `interleave`, `subset` and `shuffled_concat`, and its options."""

    concat: Parts | None = None
    """One part behind the other."""

    interleave: Parts | None = None
    """Parts in turn, or as `probabilities` draw them; the sequence of `datasets.interleave_datasets`."""

    subset: Part | None = None
    """The `portion` of one part: its start, or with `shuffle` samples from all of it."""

    shuffled_concat: Parts | None = None
    """Parts one behind the other, repeated until `portion` is reached, shuffled together and cut to it."""

    probabilities: tuple[Annotated[float, pydantic.Field(ge=0)], ...] | None = None
    """Of interleave: one for each part, with the sum 1."""

    stopping_strategy: Stop | None = None
    """Of interleave: an epoch ends with the first part that is through (default), or the last; others start again."""

    portion: pydantic.PositiveFloat | None = None
    """Of subset: above 0, 1 at most. Of shuffled_concat: any above 0, default 1."""

    shuffle: bool | None = None
    """Of subset, default true."""

    seed: pydantic.NonNegativeInt | None = None
    """Of interleave, subset and shuffled_concat, default 42."""

    @property
    def operation(self) -> str:
        """Which of OPTIONS it is."""
        return next(name for name in OPTIONS if getattr(self, name) is not None)

    @property
    def parts(self) -> tuple["int | str | Mix", ...]:
        """What is mixed."""
        value = getattr(self, self.operation)
        return value if isinstance(value, tuple) else (value,)

    @pydantic.model_validator(mode="after")
    def _check(self) -> "Mix":
        given = [name for name in OPTIONS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"found {found}; expected exactly one of {', '.join(OPTIONS)}")
        options = dict.fromkeys(option for options in OPTIONS.values() for option in options)
        for name in options:
            if getattr(self, name) is not None and name not in OPTIONS[given[0]]:
                readers = " and ".join(node for node, read in OPTIONS.items() if name in read)
                raise ValueError(f'found "{name}" beside "{given[0]}"; it is an option of {readers}. Remove it')
        if self.subset is not None and (self.portion is None or self.portion > 1):
            found = "no portion" if self.portion is None else f"portion {self.portion:g}"
            raise ValueError(f"found {found} of a subset, expected one above 0 and at most 1")
        if self.probabilities is not None:
            check_probabilities(self.probabilities, len(self.parts), self.stopping_strategy or "first_exhausted")
        return self

    def leaves(self) -> list[int | str]:
        """The sets that it names, in their order, with repeats."""
        return [leaf for part in self.parts for leaf in (part.leaves() if isinstance(part, Mix) else [part])]


def check_probabilities(probabilities: Sequence[float], parts: int, stop: Stop) -> None:
    """Raise ValueError for probabilities that do not fit `parts` parts, or would never end."""
    if len(probabilities) != parts:
        raise ValueError(f"found {len(probabilities)} probabilities for {parts} parts, expected one for each")
    total = math.fsum(probabilities)
    if abs(total - 1) > 1e-8:
        raise ValueError(f"the probabilities sum up to {total:.9g}, expected 1")
    if stop == "all_exhausted" and 0 in probabilities:
        number = list(probabilities).index(0)
        raise ValueError(
            f"part {number} has probability 0 and never comes to its end, which all_exhausted waits for; "
            "remove the part, or take first_exhausted"
        )


def set_number(leaf: int | str, names: Sequence[str | None]) -> int:
    """Number of the set that a leaf names, of sets with these names. Raises ValueError for one that is not there."""
    if isinstance(leaf, str):
        if leaf not in names:
            known = ", ".join(f'"{name}"' for name in names if name) or "none has a name"
            raise ValueError(f'mixing names the set "{leaf}"; expected a "name" of basic_parameters: {known}')
        return names.index(leaf)
    if leaf >= len(names):
        raise ValueError(
            f"mixing names set {leaf}, but basic_parameters has {len(names)}; expected 0 to {len(names) - 1}"
        )
    return leaf


def check_mix(mix: Mix | None, names: Sequence[str | None], *, weighted: bool = False) -> None:
    """Raise ValueError where a mix and the sets that have these names (or none) do not fit each other."""
    named = [name for name in names if name is not None]
    twice = [name for number, name in enumerate(named) if name in named[:number]]
    if twice:
        raise ValueError(f'two sets of basic_parameters have the name "{twice[0]}"; expected each name once')
    if mix is None:
        return
    if weighted:
        raise ValueError('found both "mixing" and sets with a "weight"; keep one (interleave has probabilities)')
    used = {set_number(leaf, names) for leaf in mix.leaves()}
    unused = [number for number in range(len(names)) if number not in used]
    if unused:
        raise ValueError(
            f"set {unused[0]} of basic_parameters is nowhere in mixing, so that nothing of it would be trained on; "
            "name it there, or remove it"
        )


def interleaved(
    sizes: Sequence[int],
    probabilities: Sequence[float] | None = None,
    *,
    seed: int = DEFAULT_SEED,
    stop: Stop = "first_exhausted",
) -> np.ndarray:
    """Indices [n] int64 into sets of `sizes` samples that follow each other, as datasets.interleave_datasets has them.

    Without probabilities the sets take turns; with them numpy's generator draws the set of each sample. The sample
    that ends an epoch is in it. Sizes are 1 at least. Raises ValueError for probabilities that do not fit.
    """
    lengths = np.asarray(sizes, dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    if probabilities is None:
        rounds = lengths.min() if stop == "first_exhausted" else lengths.max()
        return (np.arange(rounds)[:, None] % lengths + starts).reshape(-1)
    check_probabilities(probabilities, len(sizes), stop)
    generator, drawn = np.random.default_rng(seed), []
    counts, end = np.zeros_like(lengths), np.any if stop == "first_exhausted" else np.all
    while not end(counts >= lengths):
        drawn.append(generator.choice(len(sizes), size=DRAWN_AT_ONCE, p=probabilities))
        counts += np.bincount(drawn[-1], minlength=len(sizes))
    chosen = np.concatenate(drawn)
    places = [np.flatnonzero(chosen == number) for number in range(len(sizes))]
    lasts = [place[size - 1] for place, size in zip(places, lengths, strict=True) if len(place) >= size]
    last = min(lasts) if stop == "first_exhausted" else max(lasts)
    result = np.empty(len(chosen), dtype=np.int64)
    for place, start, size in zip(places, starts, lengths, strict=True):
        result[place] = start + np.arange(len(place)) % size
    return result[: last + 1]


def subset(size: int, portion: float, *, shuffle: bool = True, seed: int = DEFAULT_SEED) -> np.ndarray:
    """int(size * portion) indices [n] int64 below `size`, from the start or drawn without repeats."""
    chosen = np.random.default_rng(seed).permutation(size) if shuffle else np.arange(size)
    return chosen[: int(size * portion)]


def shuffled(size: int, portion: float = 1.0, *, seed: int = DEFAULT_SEED) -> np.ndarray:
    """int(size * portion) indices [n] int64 below `size`: ceil(portion) repeats of all, shuffled and cut."""
    repeated = np.tile(np.arange(size), math.ceil(portion))
    return np.random.default_rng(seed).permutation(repeated)[: int(size * portion)]


def mixed_indices(mix: Mix, sizes: Sequence[int], names: Sequence[str | None]) -> np.ndarray:
    """The samples of an epoch, [n] int64: indices into the sets, which follow each other and have these sizes.

    Raises ConfigError where a portion leaves nothing.
    """
    ends = np.cumsum(sizes)

    def indices(part: int | str | Mix) -> np.ndarray:
        if isinstance(part, Mix):
            return _node(part, [indices(inner) for inner in part.parts])
        number = set_number(part, names)
        return np.arange(ends[number] - sizes[number], ends[number])

    return indices(mix)


def _node(mix: Mix, parts: list[np.ndarray]) -> np.ndarray:
    """The samples of a node whose parts have these samples."""
    joined = np.concatenate(parts)
    seed = DEFAULT_SEED if mix.seed is None else mix.seed
    portion = 1.0 if mix.portion is None else mix.portion
    makers: dict[str, Callable[[], np.ndarray]] = {
        "concat": lambda: np.arange(len(joined)),
        "interleave": lambda: interleaved(
            [len(part) for part in parts], mix.probabilities, seed=seed, stop=mix.stopping_strategy or "first_exhausted"
        ),
        "subset": lambda: subset(len(joined), portion, shuffle=mix.shuffle is not False, seed=seed),
        "shuffled_concat": lambda: shuffled(len(joined), portion, seed=seed),
    }
    chosen = makers[mix.operation]()
    if not len(chosen):
        raise ConfigError(
            f"data config: mixing: {mix.operation} with portion {portion:g} of {len(joined)} samples leaves none; "
            "raise the portion."
        )
    return joined[chosen]
