"""Which linears of a part take adapters, found by name in the part's weight rules, without its torch module."""

from __future__ import annotations

import difflib
import re
from typing import Any, NamedTuple

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.adapters.spec import ALL_LINEAR, LoraSpec, fits
from mindspeed_mm.weights.rules import Step

DIALECT = "hf"
"""Names that targets are given in."""

WEIGHT = ".weight"
ADAPTER = ".lora."
"""What is in the name of every A and B of ours."""
_LINEAR = re.compile(r"(^|\.)linear_\w+\.weight$")
_PATTERN_SIGNS = set("*+?|()[]\\^$")


class Site(NamedTuple):
    """One linear in Hugging Face's sense: source `number` of the step that makes one of our tensors."""

    step: Step
    number: int

    @property
    def module(self) -> str:
        """Hugging Face's name of the module, such as model.layers.0.self_attn.q_proj."""
        return self.step.sources[self.number].removesuffix(WEIGHT)

    @property
    def short(self) -> str:
        """The last word of it, under which our module keeps the adapter."""
        return self.module.rpartition(".")[2]

    @property
    def owner(self) -> str:
        """Our module that computes it, such as decoder.layers.0.self_attention.linear_qkv."""
        return self.step.target.removesuffix(WEIGHT)


def all_sites(part: Any, spec: Any) -> list[Site]:
    """Every linear of a part that can take an adapter. Embeddings, convolutions and the head cannot."""
    steps = part.rules[DIALECT].steps(spec.geometry) if DIALECT in part.rules else []
    return [
        Site(step, number)
        for step in steps
        if not step.unused and step.rule.axis is not None and _LINEAR.search(step.target)
        for number in range(len(step.sources))
    ]


def sites(part: Any, spec: Any) -> list[Site]:
    """The linears that spec.lora names, in the order of the rules.

    Raises ConfigError for a name or pattern that fits none, with those that exist.
    """
    known, wanted = all_sites(part, spec), spec.lora.target_modules
    if wanted == ALL_LINEAR or wanted == [ALL_LINEAR]:
        found, missed = known, [] if known else [ALL_LINEAR]
    elif isinstance(wanted, str):
        found = [site for site in known if re.fullmatch(_pattern(part, wanted), site.module)]
        missed = [] if found else [wanted]
    else:
        found = [site for site in known if any(_named(site, name) for name in wanted)]
        missed = [name for name in wanted if not any(_named(site, name) for site in known)] if wanted else ["[]"]
    if missed:
        raise ConfigError(_no_match(part, known, missed))
    _check_patterns(part, spec.lora, found)
    for name in spec.lora.modules_to_save:
        if twice := next((site for site in found if _named(site, name)), None):
            raise ConfigError(
                f"{part.kind}.lora.modules_to_save: {name} is {twice.module}, which target_modules adapts, too; "
                "expected a module once. Take it out of one of them"
            )
    return found


def _check_patterns(part: Any, lora: LoraSpec, chosen: list[Site]) -> None:
    for name, pattern in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for key in pattern:
            if not any(fits(key, site.module) for site in chosen):
                known = ", ".join(dict.fromkeys(site.short for site in chosen))
                raise ConfigError(
                    f"{part.kind}.lora.{name}: {key!r} fits none of the adapted linears; expected some of {known}, or "
                    "the end of a module's name. Correct the key"
                )


def problems(parts: dict[str, Any], specs: dict[str, Any]) -> list[str]:
    """What is wrong with the `lora` blocks of a model, one line each."""
    lines = []
    for slot, spec in specs.items():
        if spec.lora is None:
            continue
        try:
            sites(parts[slot], spec)
        except ConfigError as error:
            lines.append(str(error))
    return lines


def is_b(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's B."""
    return ADAPTER in name and name.endswith(".b")


def as_targets(words: list[str]) -> str | list[str]:
    """target_modules of a command line's words: one word with signs of a regular expression is a pattern."""
    if len(words) == 1 and (words[0] == ALL_LINEAR or _PATTERN_SIGNS & set(words[0])):
        return words[0]
    return words


def _pattern(part: Any, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(
            f"{part.kind}.lora.target_modules: found {text!r}, which is no regular expression ({error}); expected "
            f'"{ALL_LINEAR}", a list of names or a regular expression'
        ) from error


def _named(site: Site, name: str) -> bool:
    return any(full == name or full.endswith("." + name) for full in (site.module, site.owner))


def _no_match(part: Any, known: list[Site], missed: list[str]) -> str:
    names = list(dict.fromkeys(name for site in known for name in (site.short, site.owner.rpartition(".")[2])))
    near = [name for word in missed for name in difflib.get_close_matches(word, names, n=1)]
    hint = f" (did you mean {', '.join(near)}?)" if near else ""
    return (
        f"{part.kind}.lora.target_modules: {', '.join(missed)} fits no linear of this part{hint}; expected some of "
        f"{', '.join(names) or 'none, it has no linear that can take an adapter'}, or {ALL_LINEAR}. Correct the names"
    )
