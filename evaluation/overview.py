"""overview.html: the finished evaluations of a folder, every model beside the others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.charts import Bar, make_bar, number_text, template, track_top
from evaluation.outputs import replace
from evaluation.results import PAGE_SUFFIX, REPORT_SUFFIX, Finished, find_results
from evaluation.wording import decoding_text, prompts_text

OVERVIEW = "overview.html"


def write_overview(folder: Path) -> dict[str, Path]:
    """Write the page as soon as `folder` holds two evaluations; returns its path as {"overview": path}, or nothing."""
    if len(list(folder.glob(f"*{REPORT_SUFFIX}"))) < 2:
        return {}
    found, problems = find_results(folder)
    page = render_overview(found, problems)
    path = folder / OVERVIEW
    replace(path, lambda target: target.write_text(page, encoding="utf-8"))
    return {"overview": path}


def render_overview(found: Sequence[Finished], problems: dict[str, str]) -> str:
    """The page: a table of models by benchmarks, then one table for each set of questions."""
    groups = by_questions(found)
    titles = _titles(list(groups))
    models = sorted({one.model for one in found})
    headlines = {(one.model, titles[one.questions]): _headline(one) for one in found}
    return template("overview.html.jinja").render(
        models=models,
        benchmarks=[titles[questions] for questions in groups],
        headlines=headlines,
        groups=[(titles[questions], [_entry(one, own) for one in own]) for questions, own in groups.items()],
        problems=problems,
    )


def by_questions(found: Sequence[Finished]) -> dict[tuple[str, str], list[Finished]]:
    """Results on the same benchmark and table, which can be compared, in the order given."""
    groups: dict[tuple[str, str], list[Finished]] = {}
    for one in found:
        groups.setdefault(one.questions, []).append(one)
    return groups


def _titles(questions: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Names of benchmarks; with digits of the table where two tables were scored as one benchmark."""
    names = [name for name, _ in questions]
    return {key: key[0] if names.count(key[0]) == 1 else f"{key[0]} (table {key[1][:8]})" for key in questions}


def _headline(one: Finished) -> str:
    value = one.report.get("accuracy")
    return "not scored" if value is None else number_text(value, max(1.0, value))


def _entry(one: Finished, group: Sequence[Finished]) -> dict[str, Any]:
    """What the page shows of one evaluation."""
    page = one.path.with_name(one.path.name.removesuffix(REPORT_SUFFIX) + PAGE_SUFFIX)
    modes = sorted({mode for other in group for mode in other.report["scores"]}, reverse=True)
    scores = one.report["scores"]
    return {
        "model": one.model,
        "page": page.name if page.is_file() else None,
        "bars": [
            (mode, headline_bar(scores[mode], [other.report for other in group])) for mode in modes if mode in scores
        ],
        "metric": one.report.get("metric"),
        "answered": one.report.get("answered"),
        "rows": one.report.get("rows_in_table"),
        "unparsed": one.report.get("unparsed"),
        "prompts": prompts_text(one.report),
        "template": one.report.get("template"),
        "decoding": decoding_text(one.report.get("decoding")),
        "fingerprint": one.report.get("fingerprint"),
    }


def headline_bar(score: dict[str, Any], group: Sequence[dict[str, Any]]) -> Bar | None:
    """The overall number of one mode on a track that is the same for the whole group; None if nothing was scored."""
    if score["overall"] is None:
        return None
    highest = [
        end
        for report in group
        for other in report["scores"].values()
        for end in (other["overall"], *other["interval_95"])
        if end is not None
    ]
    return make_bar(score["overall"], score["interval_95"], track_top(1.0, highest))
