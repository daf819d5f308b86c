"""What a result folder holds: names of models in it, whose a file is, and the finished evaluations."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.compare import read_report
from evaluation.journal import fingerprint
from mindspeed_mm.errors import DataError
from mindspeed_mm.run_folders import name_with_run

REPORT_SUFFIX = "_report.json"
PAGE_SUFFIX = "_report.html"
SHEET_SUFFIX = ".xlsx"
TABLE_SUFFIX = "_acc.csv"
JOURNAL_SUFFIX = ".journal"
NAME_DIGITS = 8
"""Digits of a fingerprint in a name that would be taken otherwise."""
_OTHER_SUFFIXES = (SHEET_SUFFIX, TABLE_SUFFIX, PAGE_SUFFIX)

TRACKER = "latest_checkpointed_iteration.txt"


def checkpoint_name(path: str | Path) -> str:
    """Name of a model in result files: of its folder, with the iteration for a training checkpoint, so that two
    iterations of one run have two names. RUN/ema, its moving average, ends in "_ema"."""
    return name_with_run(Path(path).resolve(), _with_latest)


def _with_latest(path: Path) -> str:
    if (path / TRACKER).is_file():
        latest = (path / TRACKER).read_text(encoding="utf-8").strip()
        return f"{path.name}_iter_{int(latest):07d}" if latest.isdecimal() else f"{path.name}_{latest}"
    return path.stem if path.is_file() else path.name


def answers_name(path: str | Path, benchmark_names: tuple[str, ...]) -> str:
    """Name of the model of a file of answers: VLMEvalKit calls its files <model>_<set>.xlsx, others by their stem."""
    stem = Path(path).stem
    for name in sorted(benchmark_names, key=len, reverse=True):
        if stem.lower().endswith(f"_{name.lower()}") and len(stem) > len(name) + 1:
            return stem[: -len(name) - 1]
    return stem


def free_name(
    folder: Path, model: str, benchmark: str, facts: Mapping[str, Any], rows: int | None = None
) -> tuple[str, str]:
    """The name under which results of the run configuration `facts` are written, and why it is not `model` ("" if it
    is).

    Files called <model>_<benchmark> of another fingerprint are left alone: the name then ends in digits of this one's
    fingerprint, the same ones each time. So are files of this one on more than `rows` questions, as of a run without
    --limit: the name then ends in the number of rows. Raises DataError when files that are not this run's have that
    name, too.
    """
    own = fingerprint(facts)
    reasons: list[str] = []
    for name in (model, f"{model}-{own[:NAME_DIGITS]}"):
        taken = _taken_by(folder, f"{name}_{benchmark}", own, facts)
        if not taken and (fuller := _fuller(folder, f"{name}_{benchmark}", rows)):
            reasons.append(fuller)
            name = f"{name}-first{rows}"
            taken = _taken_by(folder, f"{name}_{benchmark}", own, facts)
        if not taken:
            return name, reasons[0] if reasons else ""
        reasons.append(taken)
    raise DataError(
        f"{reasons[-1]}, and {reasons[0]}. Nothing is overwritten: name this run with --evaluation-model, choose "
        "another --result-output-path, or move the old files away."
    )


def _fuller(folder: Path, stem: str, rows: int | None) -> str:
    """What is known of a report called `stem` on more than `rows` questions; "" where there is none."""
    report = folder / f"{stem}{REPORT_SUFFIX}"
    answered = read_report(report).get("answered") if rows is not None and report.exists() else None
    more = isinstance(answered, int) and rows is not None and answered > rows
    return f"{report} holds this model's results on {answered} questions, this run asks {rows}" if more else ""


def _taken_by(folder: Path, stem: str, own: str, facts: Mapping[str, Any]) -> str:
    """What keeps files called `stem` from being written; "" if nothing does.

    A report tells whose the files are. Without one, as after a kill between two files, they are this run's own if the
    journal beside them has answers of this fingerprint only.
    """
    report = folder / f"{stem}{REPORT_SUFFIX}"
    if report.exists():
        try:
            found = read_report(report)
        except DataError as error:
            return str(error).rstrip(".")
        if found.get("fingerprint") == own:
            return ""
        differ = sorted(name for name, value in facts.items() if found.get(name) != value)
        which = ", ".join(differ) or "facts of an earlier version"
        return f"{report} holds results of another model, table or setting (different: {which})"
    others = [folder / f"{stem}{suffix}" for suffix in _OTHER_SUFFIXES if (folder / f"{stem}{suffix}").exists()]
    journals = {path.name.split(".")[0] for path in (folder / f"{stem}{JOURNAL_SUFFIX}").glob("*.jsonl")}
    if others and journals != {own}:
        return f"{others[0]} is there, and no {report.name} beside it says whose results they are"
    return ""


@dataclass(frozen=True)
class Finished:
    """A finished evaluation in a folder."""

    path: Path
    report: dict[str, Any]

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.report["model"]

    @property
    def questions(self) -> tuple[str, str]:
        """What only results on the same questions share: the benchmark, and the table by its contents."""
        return self.report["benchmark"], self.report["table_sha256"]


def find_results(folder: Path) -> tuple[list[Finished], dict[str, str]]:
    """The finished evaluations of a folder, by benchmark, table and model, and what is wrong with reports that cannot
    be read, by file name."""
    found, problems = [], {}
    for path in sorted(folder.glob(f"*{REPORT_SUFFIX}")):
        try:
            report = read_report(path)
        except DataError as error:
            problems[path.name] = str(error)
            continue
        found.append(Finished(path, report))
    return sorted(found, key=lambda one: (one.questions, one.model, one.path.name)), problems
