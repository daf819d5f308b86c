"""The report as one HTML page: scores with intervals, a chart by category, and the rows with thumbnails and filters.

The page needs nothing from the network and runs no script but its own filter.
"""

from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

import PIL.Image

from evaluation.charts import table_lines, template
from evaluation.drawing import encoded, with_boxes
from evaluation.report import Report
from evaluation.tsv import Row, Table
from evaluation.wording import cut, decoding_text, prompts_text, shots_text
from mindspeed_mm.errors import DataError

MAX_ROWS = 500
"""Rows shown, wrong ones first; a page with every image of a large table would not open."""
THUMBNAIL = 112
"""Longer side of a thumbnail in pixels."""
SHOWN = 600
"""Characters of a text that are shown."""
UNREADABLE = "(nothing)"
"""What is shown where no rule could read an answer."""


def render_page(
    table: Table, answers: Mapping[int | str, str], report: Report | None, summary: Mapping[str, Any]
) -> str:
    """The page of a finished evaluation; without a report it shows the answers only. Equal results, equal text."""
    rows = [row for row in table.rows if row.index in answers]
    if report is not None:
        rows.sort(key=lambda row: report.rows[row.index].hit)
    thumbnails: dict[str, list[str]] = {}
    shown = [_row(row, table, answers[row.index], report, thumbnails) for row in rows[:MAX_ROWS]]
    scores, scoring = summary.get("scores", {}), summary.get("scoring")
    return template("page.html.jinja").render(
        model=summary.get("model"),
        benchmark=summary.get("benchmark"),
        facts=_facts(summary),
        scores=scores,
        scoring=scoring,
        chart=table_lines(scores[scoring]) if scoring in scores else [],
        rows=shown,
        total=len(rows),
        drawn=report is not None and bool(report.boxes),
        categories=sorted({row["category"] for row in shown if row["category"]}),
    )


def _facts(summary: Mapping[str, Any]) -> dict[str, str]:
    """What a reader should know of the run, in words."""
    facts = {
        "table": f"{summary.get('table')}: {summary.get('table_is')}",
        "prompts": prompts_text(summary),
        "examples before each question": shots_text(summary),
        "template": summary.get("template"),
        "decoding": decoding_text(summary.get("decoding")),
        "precision": summary.get("dtype"),
        "answers of": summary.get("predictions"),
        "limit": summary.get("limit"),
        "fingerprint": summary.get("fingerprint"),
    }
    return {name: str(value) for name, value in facts.items() if value is not None}


def _row(
    row: Row, table: Table, answer: str, report: Report | None, thumbnails: dict[str, list[str]]
) -> dict[str, Any]:
    """What the template shows of a row. `thumbnails` keeps those made so far, by the rows' `image`."""
    score = report.rows[row.index] if report is not None else None
    cells = row.cells
    images, problem = [], ""
    try:
        boxes = report.boxes.get(row.index) if report is not None else None
        if boxes is not None:
            images = [encoded(with_boxes(image, boxes)) for image in table.images(row)]
        else:
            images = thumbnails.get(row.image) or [_thumbnail(image) for image in table.images(row)]
            if row.image:
                thumbnails[row.image] = images
    except DataError as error:  # answers that were recorded elsewhere are scored all the same
        problem = str(error)
    return {
        "index": row.index,
        "images": images,
        "problem": problem,
        "question": cut(cells.get("question", cells.get("expression", "")), SHOWN),
        "options": [f"{letter}. {cut(cells[letter], SHOWN)}" for letter in ascii_uppercase if cells.get(letter)],
        "truth": cut(cells.get("answer", cells.get("bbox", "")), SHOWN),
        "prediction": cut(answer, SHOWN),
        "extracted": cut(score.extracted or UNREADABLE, SHOWN) if score else "",
        "hit": score.hit if score else None,
        "category": cells.get("category", ""),
    }


def _thumbnail(image: PIL.Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return encoded(small)
