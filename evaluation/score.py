"""Score answers that are already there."""

from pathlib import Path

from evaluation.benchmarks import MODES, Mode, find_benchmark, refuse_other_table
from evaluation.judge_protocol import Judge
from evaluation.predictions import Predictions, match_predictions
from evaluation.questions import read_questions
from evaluation.report import Report
from mindspeed_mm.errors import DataError


def score(
    benchmark: str,
    predictions: Predictions,
    tsv: str | Path,
    mode: Mode = "strict",
    *,
    allow_missing: bool = False,
    image_root: str | Path | None = None,
    text_questions: bool = False,
    judge: Judge | None = None,
    accept_table: bool = False,
) -> Report:
    """Score answers to a benchmark table.

    `benchmark` is a name in any case ("ai2d_test", "AI2D_TEST") or the user's own name of a table; `predictions`
    {index: answer}, [{"index", "prediction"}], or a .json, .jsonl or .xlsx file of these; `tsv` the benchmark's file
    (see evaluation.questions). `mode` "strict" is the benchmark's definition, "compat" equals VLMEvalKit row by row.
    `text_questions` scores the rows without an image too. `judge` reads the answers that the rules cannot; by default
    they are wrong. `accept_table`: the table is what `benchmark` says, whatever its file's name and number of rows say.

    Raises DataError for an unusable table or answers (see read_questions and match_predictions), an unknown name, or
    the table of another benchmark.
    """
    if mode not in MODES:
        raise DataError(f"found mode {mode!r}; expected {' or '.join(MODES)}.")
    table = read_questions(tsv, image_root=image_root, text_questions=text_questions)
    found = find_benchmark(benchmark, table)
    refuse_other_table(found, table, accept_table=accept_table)
    answers, missing = match_predictions(
        predictions, table, allow_missing=allow_missing, by_order=getattr(found, "by_order", False)
    )
    return found.score(table, answers, mode, missing, judge)
