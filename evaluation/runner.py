"""Ask every question of a benchmark table, keep the answers as they come, score and write the results."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.benchmarks import MODES, PROMPT_STYLES, Benchmark, Mode, Prompt, PromptStyle, find_benchmark
from evaluation.engine import Communicator, Engine, GenerationRequest, SingleRank
from evaluation.journal import Journal, fingerprint
from evaluation.outputs import check_folder, check_output_name, write_outputs
from evaluation.questions import read_questions
from evaluation.report import Report
from evaluation.tsv import Row, Table
from mindspeed_mm.errors import DataError


@dataclass(frozen=True)
class Result:
    """A finished evaluation. `reports` is by scoring mode, empty for a table without answers."""

    reports: dict[str, Report]
    predictions: dict[int | str, str]
    files: dict[str, Path]
    """Paths by kind (predictions, accuracy, report); empty on ranks other than 0."""
    resumed: int
    """Answers taken from the journal of earlier runs."""


def run(
    benchmark: str,
    tsv: str | Path,
    engine: Engine,
    out_dir: str | Path,
    *,
    model: str,
    prompt_style: PromptStyle = "official",
    scoring: Mode = "strict",
    batch_size: int = 1,
    limit: int | None = None,
    communicator: Communicator | None = None,
    image_root: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """Evaluate `engine` on the table `tsv` as `benchmark` and write <model>_<benchmark>.* into `out_dir`.

    The questions that no journal in `out_dir` answers are divided among the ranks of `communicator` (any number; None
    is a single process), and each rank journals every answer at once. Every rank returns the same reports; rank 0
    writes. `scoring` chooses the numbers of the sheet and the accuracy table; the JSON report holds those of every
    mode. `limit` asks the first rows of the table only.

    Raises DataError for an unusable table, name, folder or journal, before the first question is asked.
    """
    communicator = communicator or SingleRank()
    folder = Path(out_dir)
    table, found = check(
        benchmark,
        tsv,
        folder,
        model=model,
        prompt_style=prompt_style,
        scoring=scoring,
        batch_size=batch_size,
        limit=limit,
        image_root=image_root,
    )
    prompts = found.prompts(table, prompt_style)
    rows = table.rows[:limit]
    facts = {"benchmark": found.name, "table_sha256": table.sha256, "prompt_style": prompt_style, **engine.describe()}

    stem = f"{model}_{benchmark}"
    journal = Journal(folder / f"{stem}.journal", facts, communicator.rank)
    earlier = _merge(communicator.all_gather(journal.read()))
    pending = [row for row in rows if row.index not in earlier]
    pending.sort(key=lambda row: _cost(row, prompts[row.index]), reverse=True)
    own = pending[communicator.rank :: communicator.world_size]
    with _progress_bar(found.name, len(own), progress and communicator.rank == 0) as advance:
        new = _answer(own, table, prompts, engine, journal, batch_size, advance)
    collected = {**earlier, **_merge(communicator.all_gather(new))}
    answers = {row.index: collected[row.index] for row in rows}

    reports = {mode: found.score(table, answers, mode) for mode in MODES} if found.has_answers(table) else {}
    files = {}
    if communicator.rank == 0:
        summary = _summary(model, table, facts, limit, scoring, reports, len(answers))
        files = write_outputs(folder, stem, table, answers, reports.get(scoring), summary)
    communicator.all_gather(None)
    return Result(reports, answers, files, resumed=len(rows) - len(pending))


def check(
    benchmark: str,
    tsv: str | Path,
    out_dir: str | Path,
    *,
    model: str,
    prompt_style: str = "official",
    scoring: str = "strict",
    batch_size: int = 1,
    limit: int | None = None,
    image_root: str | Path | None = None,
) -> tuple[Table, Benchmark]:
    """Read and check all that `run` needs but the engine, as `run` does. Raises DataError."""
    check_output_name(benchmark, "the benchmark's name")
    check_output_name(model, "the model's name")
    if prompt_style not in PROMPT_STYLES:
        raise DataError(f"found prompt style {prompt_style!r}; expected {' or '.join(PROMPT_STYLES)}.")
    if scoring not in MODES:
        raise DataError(f"found scoring {scoring!r}; expected {' or '.join(MODES)}.")
    if batch_size < 1:
        raise DataError(f"found batch size {batch_size}; expected 1 or more.")
    if limit is not None and limit < 1:
        raise DataError(f"found limit {limit}; expected 1 or more, or none to ask every question.")
    table = read_questions(tsv, image_root=image_root)
    found = find_benchmark(benchmark, table)
    check_folder(Path(out_dir))
    return table, found


def _answer(
    rows: Sequence[Row],
    table: Table,
    prompts: dict[int | str, Prompt],
    engine: Engine,
    journal: Journal,
    batch_size: int,
    advance: Callable[[], None],
) -> dict[int | str, str]:
    """Ask the engine for every row, batch by batch; pictures are decoded when their batch comes."""
    answers: dict[int | str, str] = {}
    try:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            requests = [
                GenerationRequest(row.index, prompts[row.index].turns, prompts[row.index].text, table.images(row))
                for row in batch
            ]
            expected = {request.id for request in requests}
            for index, text in engine.generate(requests):
                if index not in expected:
                    raise ValueError(f"the engine answered id {index!r}, which is not open in this batch ({expected}).")
                expected.remove(index)
                journal.append(index, text)
                answers[index] = text
                advance()
            if expected:
                raise ValueError(f"the engine gave no answer for ids {sorted(expected, key=str)}.")
    finally:
        journal.close()
    return answers


def _merge(parts: Sequence[dict[int | str, str]]) -> dict[int | str, str]:
    return {index: text for part in parts for index, text in part.items()}


def _cost(row: Row, prompt: Prompt) -> tuple[int, int]:
    """Sort key of work: long prompts first, so that memory trouble shows early and batches hold similar lengths."""
    return row.image_count, len(prompt.text if prompt.turns is None else prompt.turns[0][0])


def _summary(
    model: str,
    table: Table,
    facts: dict[str, Any],
    limit: int | None,
    scoring: str,
    reports: dict[str, Report],
    answered: int,
) -> dict[str, Any]:
    """The JSON report. It names all that the numbers depend on, and nothing that may differ between equal runs."""
    chosen = reports.get(scoring)
    return {
        "model": model,
        "table": table.path.name,
        "rows_in_table": len(table.all_cells),
        "dropped_without_picture": len(table.dropped),
        "answered": answered,
        "limit": limit,
        **facts,
        "fingerprint": fingerprint(facts),
        "scoring": scoring,
        "accuracy": chosen.overall if chosen else None,
        "unparsed": chosen.unparsed if chosen else None,
        "scores": {mode: report.to_json() for mode, report in reports.items()},
    }


@contextmanager
def _progress_bar(name: str, total: int, show: bool) -> Iterator[Callable[[], None]]:
    """A bar with remaining time on stderr."""
    if not show or total == 0:
        yield lambda: None
        return
    import rich.console
    import rich.progress

    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("ETA"),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True)) as bar:
        task = bar.add_task(name, total=total)
        yield lambda: bar.advance(task)
