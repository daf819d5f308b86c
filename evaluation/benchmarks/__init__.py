"""Benchmarks: one module each, found by scanning this folder for modules with a `BENCHMARK`.

A multiple-choice file of a user's own needs no module: its columns say what it is.
"""

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from evaluation.report import Report
from evaluation.tsv import Table
from mindspeed_mm.errors import DataError

PromptStyle = Literal["official", "vlmevalkit"]
PROMPT_STYLES: tuple[PromptStyle, ...] = ("official", "vlmevalkit")
"""official: the model's own training template around the benchmark's text; vlmevalkit: that kit's LLaVA prompt."""

Mode = Literal["strict", "compat"]
MODES: tuple[Mode, ...] = ("strict", "compat")
"""strict: the benchmark's definition on undamaged text; compat: equal to VLMEvalKit row by row."""


@dataclass(frozen=True)
class Prompt:
    """One of the two is given: pairs (question, open answer None) for a template, or the finished text.

    Both hold one `<image>` per picture.
    """

    turns: tuple[tuple[str, str | None], ...] | None = None
    text: str | None = None


class Benchmark(Protocol):
    """What a benchmark module provides as `BENCHMARK`."""

    name: str
    """VLMEvalKit's spelling; any case is accepted where users name it."""

    def check(self, table: Table) -> None:
        """Raise DataError when the table lacks a column that the benchmark needs."""

    def prompts(self, table: Table, style: PromptStyle) -> dict[int | str, Prompt]:
        """The prompt of every row, by index."""

    def has_answers(self, table: Table) -> bool:
        """True when the table holds the right answers, so that `score` can be called."""

    def score(self, table: Table, predictions: Mapping[int | str, str], mode: Mode, missing: int = 0) -> Report:
        """Score answers, given by index in table order."""


def known_benchmarks() -> dict[str, Benchmark]:
    """Every benchmark with a module of its own, by lower-case name."""
    return dict(_scan())


def find_benchmark(name: str, table: Table) -> Benchmark:
    """The benchmark called `name` (any case), or plain multiple choice if the columns of `table` are question, A, B.

    Raises DataError for an unknown name whose table is not multiple choice, with the nearest names.
    """
    from evaluation.benchmarks.mcq._choice import MultipleChoice, refuse_special_rules

    benchmark = _scan().get(name.lower())
    if benchmark is None:
        refuse_special_rules(name, table)
        if not {"question", "A", "B"} <= set(table.columns):
            close = difflib.get_close_matches(name.lower(), _scan(), n=3, cutoff=0.4) or sorted(_scan())
            raise DataError(
                f"no benchmark is called {name} (nearest: {', '.join(close)}), and {table.path} is not plain multiple "
                f"choice: found columns {', '.join(table.columns)}, expected question, A and B. "
                "Correct the name or the table."
            )
        benchmark = MultipleChoice(name)
    benchmark.check(table)
    return benchmark


@functools.cache
def _scan() -> dict[str, Benchmark]:
    found: dict[str, Benchmark] = {}
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        if module.ispkg or module.name.rsplit(".", 1)[-1].startswith("_"):
            continue
        benchmark = importlib.import_module(module.name).BENCHMARK
        found[benchmark.name.lower()] = benchmark
    return found
