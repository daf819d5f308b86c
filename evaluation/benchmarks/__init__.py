"""Benchmarks: one module each, found by scanning this folder for modules with a `BENCHMARK` (or `BENCHMARKS`).

A table of a user's own needs no module: its columns say whether it is multiple choice, yes-no or open questions.
"""

import difflib
import functools
import importlib
import pkgutil

from evaluation.benchmark import Benchmark
from evaluation.tsv import Table
from mindspeed_mm.errors import DataError

_TYPING_ERROR = 0.85
"""Names more alike than this (difflib ratio) to a known one, but not equal to it, are taken for typing errors."""


def known_benchmarks() -> dict[str, Benchmark]:
    """Every benchmark with a module of its own, by lower-case name; aliases included."""
    return dict(_scan())


def find_benchmark(name: str, table: Table) -> Benchmark:
    """The benchmark called `name` (any case), or one for a table of the user's own.

    Raises DataError for an unknown name with the nearest names, when it looks like a typing error or when the table
    is neither multiple choice (columns question, A, B) nor questions (column question).
    """
    benchmark = _scan().get(name.lower())
    if benchmark is None:
        likely = difflib.get_close_matches(name.lower(), _scan(), n=3, cutoff=_TYPING_ERROR)
        own = None if likely else _own_benchmark(name, table)
        if own is None:
            close = likely or difflib.get_close_matches(name.lower(), _scan(), n=3, cutoff=0.4)
            known = f"nearest: {', '.join(close)}" if close else f"known: {', '.join(sorted(_main_names()))}"
            advice = "a name that is less like these, and columns" if likely else "columns"
            raise DataError(
                f"no benchmark is called {name} ({known}). Correct the name; for a table of your own, give {advice} "
                f"question, A, B, ... or question and answer; {table.path} has {', '.join(table.columns)}."
            )
        benchmark = own
    benchmark.check(table)
    return benchmark


def _own_benchmark(name: str, table: Table) -> Benchmark | None:
    from evaluation.benchmarks.mcq._choice import MultipleChoice, refuse_rotations
    from evaluation.benchmarks.vqa._open import OWN_QUESTIONS
    from evaluation.benchmarks.yesno._yesno import YesNo, is_yes_no

    if {"question", "A", "B"} <= set(table.columns):
        refuse_rotations(name, table)
        return MultipleChoice(name)
    if "question" not in table.columns:
        return None
    return YesNo(name) if is_yes_no(table) else OWN_QUESTIONS(name)


def _main_names() -> set[str]:
    return {benchmark.name.lower() for benchmark in _scan().values()}


@functools.cache
def _scan() -> dict[str, Benchmark]:
    found: dict[str, Benchmark] = {}
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        if module.ispkg or module.name.rsplit(".", 1)[-1].startswith("_"):
            continue
        loaded = importlib.import_module(module.name)
        for benchmark in getattr(loaded, "BENCHMARKS", None) or (loaded.BENCHMARK,):
            for name in (benchmark.name, *benchmark.aliases):
                found[name.lower()] = benchmark
    return found
