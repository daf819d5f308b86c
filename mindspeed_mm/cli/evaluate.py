"""`mindspeed-mm evaluate`: scores a model, or answers that are already there, on a benchmark; compares runs."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from mindspeed_mm.cli.flags.launcher import add_launcher_flags, check_launcher_flags
from mindspeed_mm.cli.flags.model import add_model_arguments, add_parallel_arguments, load_model
from mindspeed_mm.cli.flags.shots import add_shots_arguments, given_shots
from mindspeed_mm.errors import ConfigError

HELP = "score a model on a benchmark (VLMEvalKit's TSVs and others); a killed run goes on where it was"
EXAMPLE = (
    "mindspeed-mm evaluate --model llava-1.5-7b-hf --dataset-path AI2D_TEST.tsv --evaluation-dataset ai2d_test "
    "--result-output-path evaluation_outputs"
)
logger = logging.getLogger(__name__)

GENERATION_DEFAULTS = {"max_new_tokens": 128, "do_sample": False}
"""Decoding of the guide's evaluate_llava1_5.json."""
KEY_VARIABLE = "JUDGE_API_KEY"
"""Variable with the judge's key, which is never written anywhere."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mm-model", metavar="JSON", help="the guide's evaluate_llava1_5.json; flags win over it")
    add_model_arguments(parser)
    add_parallel_arguments(parser)
    parser.add_argument("--dataset-path", metavar="FILE", help="the benchmark's TSV, JSON lines, or folder")
    parser.add_argument(
        "--evaluation-dataset", metavar="NAME", help="benchmark, or a name of your own for your own table"
    )
    parser.add_argument(
        "--evaluation-model",
        metavar="NAME",
        help="name of the model in the result files (default: the checkpoint's own)",
    )
    parser.add_argument("--result-output-path", metavar="DIR", help="folder of the results and of the answers so far")
    parser.add_argument("--image-root", metavar="DIR", help="folder of an image_path column (default: the TSV's)")
    parser.add_argument("--prompt-style", choices=("official", "vlmevalkit"), default="official")
    parser.add_argument(
        "--scoring", choices=("strict", "compat"), default="strict", help="compat: as VLMEvalKit scores"
    )
    parser.add_argument("--predictions", metavar="FILE", help="score these answers (.xlsx, .json, .jsonl) and no model")
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="WHAT",
        help="compare finished runs and do nothing else: a result folder, two *_report.json files, or names of models "
        "in --result-output-path",
    )
    parser.add_argument(
        "--judge",
        metavar="URL",
        help="OpenAI-compatible server that reads what no rule can read; for shr also a judgement.json",
    )
    parser.add_argument("--judge-model", metavar="NAME", default="judge", help="model that the judge is asked for")
    parser.add_argument(
        "--judge-key-file", metavar="FILE", help="file with the judge's key (default: the variable JUDGE_API_KEY)"
    )
    parser.add_argument(
        "--judge-prompt",
        metavar="FILE",
        help="text with {regions}, {facts} and {sentences} that shr's judge is asked with, in place of our own words",
    )
    parser.add_argument("--batch-size", type=int, default=1, help="questions answered at a time on each device")
    parser.add_argument("--max-new-tokens", type=int, help="at most so many tokens an answer (default 128)")
    parser.add_argument(
        "--text-questions", action="store_true", help="ask the rows of a TSV without an image too (all of ScienceQA)"
    )
    parser.add_argument(
        "--accept-table",
        action="store_true",
        help="the table is what --evaluation-dataset says, whatever its file name and number of rows speak for",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="ask the first N questions only")
    add_shots_arguments(parser)
    add_launcher_flags(parser)


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    """Evaluate. The first rank prints the accuracy table on stdout; every rank returns the numbers for --json."""
    if namespace.compare:
        return _compare(namespace)

    from mindspeed_mm.config.evaluation import EvaluationConfig
    from mindspeed_mm.config.inherit import read_config
    from mindspeed_mm.config.load import load_config
    from mindspeed_mm.generation.options import generation_options
    from mindspeed_mm.models.spec import MODEL_KEYS

    check_launcher_flags(namespace)
    values = read_config(namespace.mm_model) if namespace.mm_model else {}
    own = {key: value for key, value in values.items() if key not in MODEL_KEYS}
    config = load_config(
        EvaluationConfig, own | _flags(namespace), what="evaluation config", context=namespace.mm_model
    )
    generation_options(config.generation_config, context=namespace.mm_model)  # before a large table is read
    shots = given_shots(namespace)
    table, benchmark = _check_table(config, namespace, shots)
    given = GENERATION_DEFAULTS | dict(getattr(benchmark, "generation", {})) | config.generation_config
    if namespace.max_new_tokens is not None:
        given["max_new_tokens"] = namespace.max_new_tokens
    options = generation_options(given, context=namespace.mm_model)
    judge = _judge(config, namespace, benchmark)
    benchmark = _asking(benchmark, judge, namespace.judge_prompt)
    if namespace.predictions:
        communicator, engine = _recorded_engine(namespace, table, benchmark)
    else:
        communicator, engine = _model_engine(config, namespace, options)
    from evaluation.runner import run as run_evaluation

    start = time.perf_counter()
    result = run_evaluation(
        config.evaluation_dataset,
        config.dataset_path,
        engine,
        config.result_output_path,
        model=config.evaluation_model,
        prompt_style=namespace.prompt_style,
        scoring=namespace.scoring,
        batch_size=namespace.batch_size,
        limit=namespace.limit,
        communicator=communicator,
        image_root=namespace.image_root,
        text_questions=namespace.text_questions,
        judge=judge,
        checked=(table, benchmark),
        shots=shots,
    )
    seconds = time.perf_counter() - start
    if communicator.rank == 0:
        _print(result, namespace.scoring, seconds)
        _tell_table(benchmark, table)
    return _summary(result, config, namespace, seconds)


def _tell_table(benchmark, table) -> None:
    """Whose table it is, and the rows that were left out."""
    from evaluation.identity import told_identity

    sys.stderr.write(f"table {table.path.name}: {told_identity(benchmark, table)}\n")
    if table.dropped:
        sys.stderr.write(
            f"left out, because they have no image: {len(table.dropped)} rows, for example index "
            f"{table.dropped[0]} (--text-questions asks them too)\n"
        )


def _recorded_engine(namespace: argparse.Namespace, table, benchmark):
    """This process alone, and answers that a file holds already."""
    from evaluation.engine import SingleRank
    from evaluation.recorded import RecordedAnswers

    by_order = getattr(benchmark, "by_order", False)
    return SingleRank(), RecordedAnswers(namespace.predictions, table, by_order=by_order, limit=namespace.limit)


def _model_engine(config, namespace: argparse.Namespace, options):
    """The ranks of this launch and the loaded model."""
    from evaluation.ranks import connect

    device = namespace.device or (config.device.split(":")[0] if config.device else None)
    communicator = connect(device, namespace.tensor_model_parallel_size, namespace.pipeline_model_parallel_size)
    # Modules below import megatron.core, which the chosen platform has just prepared.
    from evaluation.model_engine import ModelEngine

    vlm = load_model(
        namespace,
        _model_path(namespace),
        device=device,
        dtype=config.dtype,
        tokenizer=config.tokenizer.from_pretrained if config.tokenizer else None,
        image_processor=config.image_processer_path,
    )
    if vlm.defaults.asked and communicator.rank == 0:
        logger.info(
            "%s asks for %s: not used here, an evaluation takes the benchmark's settings (greedy) and those of "
            "generation_config in --mm-model",
            vlm.defaults.where,
            vlm.defaults.asked,
        )
    return communicator, ModelEngine(vlm, options, namespace.template)


def _judge(config, namespace: argparse.Namespace, benchmark):
    if not namespace.judge:
        return None
    if "://" not in namespace.judge and getattr(benchmark, "judges_sentences", False):
        from evaluation.recorded_judge import RecordedJudge

        return RecordedJudge(namespace.judge)
    from evaluation.judge import HttpJudge

    key = os.environ.get(KEY_VARIABLE) or None
    if namespace.judge_key_file:
        try:
            key = Path(namespace.judge_key_file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(
                f"cannot read {namespace.judge_key_file}: {error.strerror}; expected a file with the judge's key"
            ) from error
    cache = Path(config.result_output_path) / "judge_replies.jsonl"
    return HttpJudge(namespace.judge, cache, model=namespace.judge_model, key=key)


def _asking(benchmark, judge, path: str | None):
    """The benchmark that asks its judge with the text of a file."""
    if not path:
        return benchmark
    if judge is None or not getattr(benchmark, "judges_sentences", False):
        raise ConfigError(
            f"--judge-prompt {path} is what shr's judge is asked with; expected it there, with --judge. Leave it out"
        )
    return benchmark.asking(path)


def _compare(namespace: argparse.Namespace) -> dict[str, Any]:
    """Print runs side by side, each against the first one on its questions, and write a page for each pair."""
    from evaluation.comparison import choose_results, compare_pair

    groups = choose_results(namespace.compare, namespace.result_output_path, namespace.evaluation_dataset)
    pairs = [(own[0], other) for own in groups for other in own[1:]]
    told = []
    for first, second in pairs:
        folder = Path(namespace.result_output_path or first.path.parent)
        found, page = compare_pair(first, second, namespace.scoring, folder)
        _print_comparison(first, second, found, rows=len(pairs) == 1)
        sys.stdout.write(f"  {page}\n")
        told.append(dataclasses.asdict(found) | {"difference": found.difference, "page": str(page)})
        told[-1] |= {"models": [first.model, second.model], "benchmark": first.report["benchmark"]}
    return told[0] if len(told) == 1 else {"comparisons": told}


def _print_comparison(first, second, found, *, rows: bool) -> None:
    from evaluation.comparison import other_differences

    low, high = found.interval
    mcnemar = "" if found.p_mcnemar is None else f", McNemar p = {found.p_mcnemar:.4g}"
    sys.stdout.write(
        f"{first.report['benchmark']}: {found.metric} ({found.mode}), {found.units} questions\n"
        f"  A {first.model} ({first.path}): {found.first:.4f}\n"
        f"  B {second.model} ({second.path}): {found.second:.4f}\n"
        f"  B - A: {found.difference:+.4f} (95% interval {low:+.4f} to {high:+.4f}), "
        f"paired bootstrap p = {found.p_bootstrap:.4g}{mcnemar}\n{len(found.flipped)} rows flipped\n"
    )
    if others := other_differences(first, second):
        sys.stdout.write(f"  not only the models differ, but also: {', '.join(others)}\n")
    for row in found.flipped if rows else ():
        (read_a, hit_a), (read_b, hit_b) = row["first"], row["second"]
        read_a, read_b = ("(nothing)" if read is None else read for read in (read_a, read_b))
        question = row["question"] if len(row["question"]) <= 80 else row["question"][:80] + "..."
        sys.stdout.write(f"  {row['index']}: {read_a} ({hit_a:g}) -> {read_b} ({hit_b:g})  {question!r}\n")


def _flags(namespace: argparse.Namespace) -> dict[str, Any]:
    """Config values given as flags. A model or answers given as a flag replace those of the JSON, and so its name."""
    from evaluation.results import answers_name, checkpoint_name

    names = ("dataset_path", "evaluation_dataset", "evaluation_model", "result_output_path")
    given = {name: getattr(namespace, name) for name in names if getattr(namespace, name) is not None}
    if "evaluation_model" in given:
        return given
    model = namespace.load or namespace.model
    if namespace.predictions:
        sets = tuple(filter(None, (namespace.evaluation_dataset, Path(namespace.dataset_path or "").stem)))
        given["evaluation_model"] = answers_name(namespace.predictions, sets)
    elif model:
        given["evaluation_model"] = checkpoint_name(model)
    return given


def _check_table(config, namespace: argparse.Namespace, shots):
    """Find what is wrong with the table or the options before the model is loaded, which may take minutes."""
    from evaluation.runner import check

    return check(
        config.evaluation_dataset,
        config.dataset_path,
        config.result_output_path,
        model=config.evaluation_model,
        prompt_style=namespace.prompt_style,
        scoring=namespace.scoring,
        batch_size=namespace.batch_size,
        limit=namespace.limit,
        image_root=namespace.image_root,
        text_questions=namespace.text_questions,
        accept_table=namespace.accept_table,
        shots=shots,
    )


def _model_path(namespace: argparse.Namespace) -> str:
    given = [path for path in (namespace.load, namespace.model, namespace.mm_model) if path]
    if not given:
        raise ConfigError(
            "nothing to load: give --model PATH, --load CHECKPOINT or --mm-model JSON, or --predictions FILE to score"
        )
    return given[0]


def _print(result, scoring: str, seconds: float) -> None:
    for mode, report in sorted(result.reports.items(), key=lambda item: item[0] != scoring):
        low, high = report.interval
        sys.stdout.write(
            f"{report.benchmark}, {mode} scoring: {report.metric} {report.overall:.4f} "
            f"(95% interval {low:.4f} to {high:.4f}), {report.n} questions, {report.unparsed} answers unreadable\n"
        )
        for name, value in report.notes.items():
            shown = value if isinstance(value, str) else f"{value:.4g}"
            sys.stdout.write(f"  {name.replace('_', ' ')}: {shown}\n")
    if result.reports:
        for split, row in result.reports[scoring].table.items():
            cells = ", ".join(f"{name} {value:.4f}" for name, value in row.items() if not math.isnan(value))
            sys.stdout.write(f"  {split}: {cells}\n")
    else:
        sys.stdout.write("the table has no answers: predictions are written, nothing is scored\n")
    for path in result.files.values():
        sys.stdout.write(f"  {path}\n")
    sys.stdout.flush()
    empty = sum(not text for text in result.predictions.values())
    if empty:
        sys.stderr.write(f"empty answers: {empty}\n")
    new = len(result.predictions) - result.resumed
    earlier = f"; {result.resumed} were answered by earlier runs" if result.resumed else ""
    sys.stderr.write(f"{new} questions in {seconds:.1f} s{earlier}\n")


def _summary(result, config, namespace: argparse.Namespace, seconds: float) -> dict[str, Any]:
    report = result.reports.get(namespace.scoring)
    return {
        "benchmark": config.evaluation_dataset,
        "model": result.model,
        "scoring": namespace.scoring,
        "prompt_style": namespace.prompt_style,
        "n": len(result.predictions),
        "metric": report.metric if report else None,
        "accuracy": report.overall if report and not math.isnan(report.overall) else None,
        "interval_95": list(report.interval) if report else None,
        "unparsed": report.unparsed if report else None,
        "resumed": result.resumed,
        "seconds": round(seconds, 3),
        "files": {kind: str(path) for kind, path in result.files.items()},
    }
