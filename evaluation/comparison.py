"""Which finished evaluations are compared, and the page that shows two of them side by side."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.charts import Bar, table_lines, template
from evaluation.compare import Comparison, compare_reports, read_report
from evaluation.outputs import check_folder, replace
from evaluation.overview import by_questions, headline_bar
from evaluation.results import Finished, find_results
from evaluation.statistics import RESAMPLES
from evaluation.wording import decoding_text, prompts_text
from mindspeed_mm.errors import DataError

MAX_ROWS = 500
"""Rows shown that differ in their score."""
_FACTS = {
    "table": "table",
    "shots": "shots",
    "shots_seed": "seed of the shots",
    "template": "template",
    "dtype": "precision",
    "weights": "weights",
    "predictions": "answers of",
    "limit": "limit",
    "fingerprint": "fingerprint",
}
"""Keys of a report that are shown for both runs, and their headings."""

_SETTINGS = ("prompt_style", "template", "decoding", "shots", "shots_seed", "dtype", "answered")
"""Keys of a report that may differ between two runs of one model."""

_TITLES = _FACTS | {"prompt_style": "prompts", "decoding": "decoding", "answered": "number of questions"}


def choose_results(
    names: Sequence[str], folder: str | Path | None = None, benchmark: str | None = None
) -> list[list[Finished]]:
    """The evaluations that `names` mean, in groups of the same questions, each of two or more.

    A name is a report.json, a folder (all evaluations in it), or a model's name in `folder`. `benchmark` keeps one.
    Raises DataError for a name that is nothing of these, and when no two results are on the same questions.
    """
    found: list[Finished] = []
    for name in names:
        found += [one for one in _expand(name, folder) if one not in found]
    if benchmark is not None:
        found = [one for one in found if one.report["benchmark"].lower() == benchmark.lower()]
    groups = [own for own in by_questions(found).values() if len(own) > 1]
    if not groups:
        listed = "; ".join(f"{one.model} on {one.report['benchmark']}, {one.report.get('table')}" for one in found)
        raise DataError(
            f"nothing to compare: found {listed or 'no evaluation'}. Two models on the same table are needed: evaluate "
            "both into one folder, or name two reports on one table."
        )
    return groups


def _expand(name: str, folder: str | Path | None) -> list[Finished]:
    path = Path(name)
    if path.is_dir():
        return _all_in(path)
    if path.is_file() or path.suffix == ".json":
        return [Finished(path, read_report(path))]
    if folder is None:
        raise DataError(
            f"{name} is no report.json and no folder; to compare models by their names, give their folder as "
            "--result-output-path."
        )
    results = _all_in(Path(folder))
    own = [one for one in results if one.model == name]
    if not own:
        known = ", ".join(sorted({one.model for one in results})) or "none"
        raise DataError(f"no evaluation of a model called {name} is in {folder}; found {known}.")
    return own


def _all_in(folder: Path) -> list[Finished]:
    results, problems = find_results(folder)
    if problems:
        raise DataError("\n  ".join([f"reports in {folder} cannot be read:", *problems.values()]))
    return results


def compare_pair(first: Finished, second: Finished, mode: str, folder: Path) -> tuple[Comparison, Path]:
    """Compare two evaluations and write the page of both into `folder`. Raises DataError (see compare_reports)."""
    comparison = compare_reports(first.path, second.path, mode)
    page = render_comparison(first, second, comparison)
    check_folder(folder)
    models = f"{_file_part(first.model)}_vs_{_file_part(second.model)}"
    path = folder / f"compare_{models}_{_file_part(first.report['benchmark'])}.html"
    replace(path, lambda target: target.write_text(page, encoding="utf-8"), kept="")
    return comparison, path


def other_differences(first: Finished, second: Finished) -> list[str]:
    """What else than the model two evaluations differ in, and what is therefore in their difference, too."""
    return [_TITLES[key] for key in _SETTINGS if first.report.get(key) != second.report.get(key)]


def _file_part(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def render_comparison(first: Finished, second: Finished, comparison: Comparison) -> str:
    """The page: both scores, their difference with its interval, the lines of the table, and the rows that differ."""
    reports = [first.report, second.report]
    scores = [report["scores"][comparison.mode] for report in reports]
    facts = [
        (title, *(str(report.get(key, "")) for report in reports))
        for key, title in _FACTS.items()
        if any(report.get(key) is not None for report in reports)
    ]
    prompts = [prompts_text(report) for report in reports]
    facts.insert(1, ("prompts", *(text or "not known" for text in prompts)))
    facts.append(("decoding", *(decoding_text(report.get("decoding")) for report in reports)))
    return template("comparison.html.jinja").render(
        models=[first.model, second.model],
        benchmark=first.report["benchmark"],
        comparison=comparison,
        facts=facts,
        headlines=[headline_bar(score, reports) for score in scores],
        difference=_difference(comparison),
        p_bootstrap=f"p = {comparison.p_bootstrap:.4g}" if comparison.p_bootstrap else f"p < {2 / RESAMPLES:g}",
        lines=_pairs_of_lines(*scores),
        rows=comparison.flipped[:MAX_ROWS],
    )


def _difference(comparison: Comparison) -> dict[str, Any]:
    """Places on a track whose middle is no difference, in per cent."""
    low, high = comparison.interval
    reach = max(abs(low), abs(high), abs(comparison.difference)) or 1.0

    def place(value: float) -> float:
        return 50 + 50 * value / reach

    left, right = sorted((50.0, place(comparison.difference)))
    signed = [f"{value:+.{4 if reach <= 1 else 1}f}" for value in (comparison.difference, low, high)]
    text = "{} ({} to {})".format(*signed)
    return {"left": left, "width": right - left, "low": place(low), "high": place(high), "text": text}


def _pairs_of_lines(
    first: dict[str, Any], second: dict[str, Any]
) -> list[tuple[str, list[tuple[str, list[Bar | None]]]]]:
    """(heading, [(column, bars of either run)]) of the columns that both or one of them has."""
    found: dict[str, dict[str, list[Bar | None]]] = {}
    for number, score in enumerate((first, second)):
        for line in table_lines(score):
            for column, bar in line.bars:
                found.setdefault(line.title, {}).setdefault(column, [None, None])[number] = bar
    return [(title, list(columns.items())) for title, columns in found.items()]
