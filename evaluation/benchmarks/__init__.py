"""Benchmarks: one module each, found by scanning this folder for modules with a `BENCHMARK` (or `BENCHMARKS`).
Other packages register theirs under this package (mindspeed_mm.registry).

A table of a user's own needs no module: its columns say whether it is multiple choice, yes-no or open questions.
"""

import difflib
import functools
import importlib
import pkgutil
import re

from evaluation.benchmark import Benchmark
from evaluation.public_tables import OTHER_MEASURES
from evaluation.tsv import Table
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.registry import registered

_TYPING_ERROR = 0.85
"""Names more alike than this (difflib ratio) to a known one, but not equal to it, are taken for typing errors."""


def known_benchmarks() -> dict[str, Benchmark]:
    """Every benchmark with a module of its own, by lower-case name; aliases included."""
    return dict(_scan())


def find_benchmark(name: str, table: Table) -> Benchmark:
    """The benchmark called `name`, or one for a table of the user's own. Case, spaces, dashes and dots in a known name
    make no difference.

    Raises DataError for an unknown name with the nearest names, when it looks like a typing error or when the table
    is neither multiple choice (columns question, A, B) nor questions (column question), and for a table that the
    benchmark cannot use, with the name of the right one where something speaks for it.
    """
    from evaluation.identity import advice_for
    from evaluation.own_tables import own_benchmark

    known = _scan()
    folded = _fold(name)
    benchmark = known.get(name.lower()) or next((one for key, one in known.items() if _fold(key) == folded), None)
    if benchmark is None:
        likely = difflib.get_close_matches(name.lower(), known, n=3, cutoff=_TYPING_ERROR)
        _refuse_other_measure(name)
        own = None if likely else own_benchmark(name, table)
        if own is None:
            close = likely or difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
            names = f"nearest: {', '.join(close)}" if close else f"known: {', '.join(sorted(_main_names()))}"
            advice = "a name that is less like these, and columns" if likely else "columns"
            raise DataError(
                f"no benchmark is called {name} ({names}). Correct the name; for a table of your own, give {advice} "
                f"question, A, B, ... or question and answer; {table.path} has {', '.join(table.columns)}."
            )
        benchmark = own
    try:
        benchmark.check(table)
    except DataError as error:
        if advice := advice_for(benchmark, table, known):
            raise DataError(f"{error} {advice}") from error
        raise
    return benchmark


def refuse_other_table(benchmark: Benchmark, table: Table, *, accept_table: bool = False) -> None:
    """Raise DataError when `table` is that of another benchmark than the known one it is scored as (see
    evaluation.identity)."""
    from evaluation.identity import refuse_other_table as refuse

    refuse(benchmark, table, _scan(), accept_table=accept_table)


RELEASES = r"mini|test|val|dev|hard|ko|in[\W_]*the[\W_]*wild"
"""What names of a benchmark's releases and parts go on with."""


def _refuse_other_measure(name: str) -> None:
    """Raise DataError for the name of a public benchmark whose score is another number than that of one's own table."""
    public = next((key for key in OTHER_MEASURES if _is_release_of(key, name)), None)
    if public is not None:
        raise DataError(
            f"{name} is the name of {public}, whose score ({OTHER_MEASURES[public]}) is not computed here. To score "
            "its table by what its columns hold, which is another number, give a name of your own, such as "
            f"own_{_fold(name)}."
        )


def _is_release_of(public: str, name: str) -> bool:
    """Whether `name` is a public benchmark's, or says a release or part of it, as in OCRBench_v2; "ocr_benchmark" is
    neither."""
    letters = r"[\W_]*".join(_fold(public))
    return re.fullmatch(rf"[\W_]*{letters}(?:[\W_]*(?:v?\d|{RELEASES}).*|[\W_]*)", name.lower()) is not None


def _fold(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum() or character == "+")


def _main_names() -> set[str]:
    return {benchmark.name.lower() for benchmark in _scan().values()}


def _scan() -> dict[str, Benchmark]:
    """All benchmarks by each of their names: those of this folder, and those that other packages registered."""
    further = registered(__name__)
    if not further:
        return _own()
    added: dict[str, Benchmark] = {}
    for benchmark in further.values():
        for name in (benchmark.name, *benchmark.aliases):
            if name.lower() in {**_own(), **added}:
                raise ConfigError(f"two benchmarks are called {name}; register the second under another name")
            added[name.lower()] = benchmark
    return {**_own(), **added}


@functools.cache
def _own() -> dict[str, Benchmark]:
    found: dict[str, Benchmark] = {}
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        if module.ispkg or module.name.rsplit(".", 1)[-1].startswith("_"):
            continue
        loaded = importlib.import_module(module.name)
        for benchmark in getattr(loaded, "BENCHMARKS", None) or (loaded.BENCHMARK,):
            for name in (benchmark.name, *benchmark.aliases):
                found[name.lower()] = benchmark
    return found
