"""Ask every question of a benchmark table, keep the answers as they come, score and write the results."""

import functools
import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.benchmark import MODES, Benchmark, Mode
from evaluation.benchmarks import find_benchmark, refuse_other_table
from evaluation.engine import Communicator, Engine, EvaluationRequest, SingleRank
from evaluation.few_shot import Examples, Shots
from evaluation.identity import told_identity
from evaluation.journal import FINGERPRINT_DIGITS, Journal, fingerprint
from evaluation.judge_protocol import Judge
from evaluation.outputs import check_folder, check_output_name, write_outputs
from evaluation.overview import write_overview
from evaluation.progress import AnswersBar
from evaluation.prompts import PROMPT_STYLES, Prompt, PromptStyle
from evaluation.questions import read_questions
from evaluation.report import Report
from evaluation.results import JOURNAL_SUFFIX, free_name
from evaluation.submissions import write_submission
from evaluation.tsv import Row, Table
from evaluation.wording import cut
from evaluation.work import split_work
from mindspeed_mm.errors import DataError

logger = logging.getLogger(__name__)

SHOWN = 200
"""Characters of questions and answers that the report repeats; the sheet and the journal have them whole."""


@dataclass(frozen=True)
class EvaluationResult:
    """A finished evaluation. `reports` is by scoring mode, empty for a table without answers."""

    reports: dict[str, Report]
    predictions: dict[int | str, str]
    files: dict[str, Path]
    """Paths by kind (predictions, accuracy, report); empty on ranks other than 0."""
    resumed: int
    """Answers taken from the journal of earlier runs."""
    model: str
    """Name of the model in the files: the one given, or with digits behind it where that one was taken."""


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
    text_questions: bool = False,
    progress: bool = True,
    judge: Judge | None = None,
    checked: tuple[Table, Benchmark] | None = None,
    accept_table: bool = False,
    shots: Shots | None = None,
) -> EvaluationResult:
    """Evaluate `engine` on the table `tsv` as `benchmark` and write <model>_<benchmark>.* into `out_dir`.

    The questions that no journal in `out_dir` answers are divided among the model's copies on the ranks of
    `communicator` (any number; None is a single process), and each copy journals every answer at once. Every rank
    returns the same reports; rank 0 writes.

    `scoring` chooses the numbers of the sheet and the accuracy table; the JSON report holds those of every mode.
    `accept_table` scores a table as `benchmark` although its file's name or number of rows speaks for another one.
    `limit` asks the first rows of the table only, `text_questions` also those of a TSV that have no image. `judge`
    reads, on rank 0, the answers that the rules cannot. `checked` is what `check` returned for the same arguments, so
    that a large table is read once. `shots` puts answered questions in front of each one (evaluation.few_shot).

    Results of another fingerprint (model, table, prompts, decoding), or on more questions, are never overwritten: where
    they have the name, this run's gets a longer one. overview.html lists the evaluations of a folder with several.

    Raises DataError for an unusable table, name, folder or journal, before the first question is asked.
    """
    communicator, folder = communicator or SingleRank(), Path(out_dir)
    asked = {"model": model, "prompt_style": prompt_style, "scoring": scoring, "batch_size": batch_size}
    asked |= {"limit": limit, "image_root": image_root, "text_questions": text_questions}
    asked |= {"accept_table": accept_table, "shots": shots}
    table, found = checked or check(benchmark, tsv, folder, **asked)
    prompts, rows = found.prompts(table, prompt_style), table.rows[:limit]
    examples = None if shots is None else Examples(shots, found, table, prompts, prompt_style)
    prompts = prompts if examples is None else examples.prompts
    facts = _facts(found, table, prompt_style, prompts, engine) | (examples.facts if examples else {})
    named = _on_first_rank(communicator, lambda: free_name(folder, model, benchmark, facts, len(rows)))
    _tell_name(model, named, communicator)
    journal = Journal(folder / f"{model}_{benchmark}{JOURNAL_SUFFIX}", facts, communicator.rank)
    bar = AnswersBar(found.name, communicator, show=progress)

    def ask(pending: Sequence[Row], writer: Journal | None) -> dict[int | str, str]:
        return _answer(_requests(pending, table, prompts, examples), engine, writer, batch_size, bar.advance)

    answers, resumed = _all_answers(rows, prompts, journal, communicator, bar, ask)
    reports = _on_first_rank(communicator, lambda: _score(found, table, answers, judge))
    name, files = _on_first_rank(
        communicator, lambda: _write(folder, model, benchmark, found, table, answers, reports, scoring, facts, limit)
    )
    return EvaluationResult(reports, answers, files if communicator.rank == 0 else {}, resumed=resumed, model=name)


def _all_answers(
    rows: Sequence[Row],
    prompts: dict[int | str, Prompt],
    journal: Journal,
    communicator: Communicator,
    bar: AnswersBar,
    ask: Callable[[Sequence[Row], Journal | None], dict[int | str, str]],
) -> tuple[dict[int | str, str], int]:
    """(the answers of all rows by index, how many of them earlier runs had): each copy of the model asks its share of
    what no journal answers."""
    earlier = _merge(communicator.all_gather(journal.read()))
    pending = [row for row in rows if row.index not in earlier]
    own = split_work(pending, prompts, communicator.replicas)[communicator.replica]
    with bar.asking(len(pending)):
        new = ask(own, journal if communicator.is_leader else None)
        bar.wait_for_others()
        collected = {**earlier, **_merge(communicator.all_gather(new))}
    return {row.index: collected[row.index] for row in rows}, len(rows) - len(pending)


def _write(
    folder: Path,
    model: str,
    benchmark: str,
    found: Benchmark,
    table: Table,
    answers: Mapping[int | str, str],
    reports: dict[str, Report],
    scoring: str,
    facts: dict[str, Any],
    limit: int | None,
) -> tuple[str, dict[str, Path]]:
    """Write all files of a finished run; returns the model's name in them, and their paths by kind."""
    # Another run may have ended since the first look.
    name, _ = free_name(folder, model, benchmark, facts, len(answers))
    stem = f"{name}_{benchmark}"
    summary = _summary(name, table, facts, limit, scoring, reports, answers)
    summary["table_is"] = told_identity(found, table)
    files = write_outputs(folder, stem, table, answers, reports.get(scoring), summary)
    files |= write_submission(folder, stem, getattr(found, "submission", None), table, answers)
    return name, files | write_overview(folder)


def _tell_name(model: str, found: tuple[str, str], communicator: Communicator) -> None:
    """Say that this run's files get a name of their own, and why."""
    name, why = found
    if why and communicator.rank == 0:
        logger.warning("%s; nothing is overwritten, this run's results are called %s", why, name)


def _facts(
    benchmark: Benchmark, table: Table, prompt_style: str, prompts: dict[int | str, Prompt], engine: Engine
) -> dict[str, Any]:
    """All that the answers depend on; their fingerprint names the run."""
    facts = {
        "benchmark": benchmark.name,
        "table_sha256": table.sha256,
        "prompt_style": prompt_style,
        "prompts": _prompts_digest(prompts),
        **engine.describe(),
    }
    if (sizes := table.image_sizes()) is not None:
        facts["image_sizes"] = sizes
    return facts


def _on_first_rank(communicator: Communicator, work: Callable[[], Any]) -> Any:
    """What `work` gives on rank 0, on every rank; its DataError, too, so that no rank waits for one that has ended."""
    outcome = None
    if communicator.rank == 0:
        try:
            outcome = work()
        except DataError as error:
            outcome = error
    outcome = communicator.all_gather(outcome)[0]
    if isinstance(outcome, DataError):
        raise outcome
    return outcome


def _score(benchmark: Benchmark, table: Table, answers: dict[int | str, str], judge: Judge | None) -> dict[str, Report]:
    """Reports by mode."""
    if not benchmark.has_answers(table):
        return {}
    return {mode: benchmark.score(table, answers, mode, judge=judge) for mode in MODES}


def _prompts_digest(prompts: dict[int | str, Prompt]) -> str:
    """Name of all prompts: answers to other wordings are never mixed."""
    digest = hashlib.sha256()
    for index, prompt in prompts.items():
        digest.update(json.dumps([index, prompt.turns, prompt.text]).encode("ascii"))
    return digest.hexdigest()[:FINGERPRINT_DIGITS]


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
    text_questions: bool = False,
    accept_table: bool = False,
    shots: Shots | None = None,
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
    table = read_questions(tsv, image_root=image_root, text_questions=text_questions)
    found = find_benchmark(benchmark, table)
    refuse_other_table(found, table, accept_table=accept_table)
    if shots is not None:
        shots.support(found, table)
    check_folder(Path(out_dir))
    return table, found


def _requests(
    rows: Sequence[Row], table: Table, prompts: dict[int | str, Prompt], examples: Examples | None
) -> list[EvaluationRequest]:
    images = table.images if examples is None else examples.images
    return [
        EvaluationRequest(
            row.index,
            prompts[row.index].turns,
            prompts[row.index].text,
            row.image if examples is None else examples.image_key(row),
            functools.partial(images, row),
        )
        for row in rows
    ]


def _answer(
    requests: Sequence[EvaluationRequest],
    engine: Engine,
    journal: Journal | None,
    batch_size: int,
    advance: Callable[[], None],
) -> dict[int | str, str]:
    """Ask the engine every request and write each answer into the journal (of the copy's first rank) as it comes."""
    answers: dict[int | str, str] = {}
    expected = {request.id for request in requests}
    try:
        for index, text in engine.generate(requests, batch_size) if requests else ():
            if index not in expected:
                raise ValueError(f"the engine answered id {index!r}, which is not open; expected each id asked, once.")
            expected.remove(index)
            if journal is not None:
                journal.append(index, text)
            answers[index] = text
            advance()
        if expected:
            example = min(expected, key=str)
            raise ValueError(f"the engine gave no answer for {len(expected)} ids, for example {example!r}.")
    finally:
        if journal is not None:
            journal.close()
    return answers


def _merge(parts: Sequence[dict[int | str, str]]) -> dict[int | str, str]:
    return {index: text for part in parts for index, text in part.items()}


def _summary(
    model: str,
    table: Table,
    facts: dict[str, Any],
    limit: int | None,
    scoring: str,
    reports: dict[str, Report],
    answers: Mapping[int | str, str],
) -> dict[str, Any]:
    """The JSON report. It names all that the numbers depend on, and nothing that may differ between equal runs."""
    chosen = reports.get(scoring)
    return {
        "model": model,
        "table": table.path.name,
        "rows_in_table": len(table.all_cells),
        "dropped_without_image": len(table.dropped),
        "answered": len(answers),
        "empty_answers": sum(not text for text in answers.values()),
        "limit": limit,
        **facts,
        "fingerprint": fingerprint(facts),
        "scoring": scoring,
        "metric": chosen.metric if chosen else None,
        "accuracy": chosen.overall if chosen and not math.isnan(chosen.overall) else None,
        "unparsed": chosen.unparsed if chosen else None,
        "scores": {mode: report.to_json() for mode, report in reports.items()},
        "rows": [_row_summary(row, answers[row.index], reports) for row in table.rows if row.index in answers],
    }


def _row_summary(row: Row, answer: str, reports: dict[str, Report]) -> dict[str, Any]:
    question = row.cells.get("question", row.cells.get("expression", ""))
    truth = row.cells.get("answer", row.cells.get("bbox", ""))
    scores = {mode: list(report.rows[row.index][:2]) for mode, report in reports.items()}
    texts = {"question": cut(question, SHOWN), "truth": cut(truth, SHOWN), "prediction": cut(answer, SHOWN)}
    return {"index": row.index, **texts, **scores}
