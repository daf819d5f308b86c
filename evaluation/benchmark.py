"""What a benchmark is: its prompts, its score, and the two ways of scoring."""

from collections.abc import Mapping
from typing import Literal, Protocol

from evaluation.judge_protocol import Judge
from evaluation.prompts import Prompt, PromptStyle
from evaluation.report import Report
from evaluation.tsv import Table
from mindspeed_mm.errors import DataError

Mode = Literal["strict", "compat"]
MODES: tuple[Mode, ...] = ("strict", "compat")
"""strict: the benchmark's definition on undamaged text; compat: equal to VLMEvalKit row by row."""


class Benchmark(Protocol):
    """What a benchmark module provides as `BENCHMARK`, or several of as `BENCHMARKS`."""

    name: str
    """VLMEvalKit's spelling; any case is accepted where users name it."""
    aliases: tuple[str, ...]
    """Other names of the same benchmark."""
    # Optional: kind, which evaluation.identity compares with what a table's columns and answers are for.

    def check(self, table: Table) -> None:
        """Raise DataError when the table lacks a column that the benchmark needs."""

    def prompts(self, table: Table, style: PromptStyle) -> dict[int | str, Prompt]:
        """The prompt of every row, by index."""

    def has_answers(self, table: Table) -> bool:
        """True when the table holds the right answers, so that `score` can be called."""

    def score(
        self,
        table: Table,
        predictions: Mapping[int | str, str],
        mode: Mode,
        missing: int = 0,
        judge: Judge | None = None,
    ) -> Report:
        """Score answers, given by index in table order."""


def refuse_missing_answers(table: Table) -> None:
    """Raise DataError where some rows have an answer and others none: nothing could be scored."""
    missing = [row.index for row in table.rows if not row.cells.get("answer", "").strip()]
    if missing and len(missing) < len(table.rows):
        raise DataError(
            f"{table.path}, row with index {missing[0]}: the answer is empty ({len(missing)} of {len(table.rows)} "
            "rows), but other rows have one; expected all of them, or none. Write it, remove the row, or leave column "
            "answer out: questions are then answered, and nothing is scored."
        )
