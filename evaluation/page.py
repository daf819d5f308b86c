"""The report as one HTML page: scores with intervals, a chart by category, and the rows with thumbnails and filters.

The page needs nothing from the network and runs no script but its own filter.
"""

import base64
import functools
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import PIL.Image

from evaluation.report import Report
from evaluation.tsv import Row, Table
from mindspeed_mm.errors import DataError

MAX_ROWS = 500
"""Rows shown, wrong ones first; a page with every image of a large table would not open."""
THUMBNAIL = 112
"""Longer side of a thumbnail in pixels."""
SHOWN = 600
"""Characters of a text that are shown."""
_TEMPLATE = Path(__file__).with_name("page.html.jinja")


def render_page(
    table: Table, answers: Mapping[int | str, str], report: Report | None, summary: Mapping[str, Any]
) -> str:
    """The page of a finished evaluation; without a report it shows the answers only. Equal results, equal text."""
    rows = [row for row in table.rows if row.index in answers]
    if report is not None:
        rows.sort(key=lambda row: report.rows[row.index].hit)
    thumbnails: dict[str, list[str]] = {}
    shown = [_row(row, table, answers[row.index], report, thumbnails) for row in rows[:MAX_ROWS]]
    facts = {
        name: summary.get(name)
        for name in ("model", "benchmark", "table", "prompt_style", "template", "decoding", "scoring", "fingerprint")
    }
    return _template().render(
        facts=facts,
        scores=summary.get("scores", {}),
        chart=_chart(report) if report else [],
        rows=shown,
        total=len(rows),
        categories=sorted({row["category"] for row in shown if row["category"]}),
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def _chart(report: Report) -> list[tuple[str, list[tuple[str, float, float]]]]:
    """Per line of the table: (column, value, width of its bar in per cent)."""
    lines = []
    for line, columns in report.table.items():
        values = {name: value for name, value in columns.items() if not math.isnan(value)}
        top = max([report.scale, *values.values()]) if report.statistic == "MME points" else report.scale
        bars = [(name, value, 100 * value / top) for name, value in values.items() if 0 <= value <= top]
        lines.append((line, bars))
    return lines


def _row(
    row: Row, table: Table, answer: str, report: Report | None, thumbnails: dict[str, list[str]]
) -> dict[str, Any]:
    """What the template shows of a row. `thumbnails` keeps those made so far, by the rows' `image`."""
    score = report.rows[row.index] if report is not None else None
    cells = row.cells
    images, problem = [], ""
    try:
        images = thumbnails.get(row.image) or [_thumbnail(image) for image in table.images(row)]
        if row.image:
            thumbnails[row.image] = images
    except DataError as error:  # answers that were recorded elsewhere are scored all the same
        problem = str(error)
    return {
        "index": row.index,
        "images": images,
        "problem": problem,
        "question": cells.get("question", cells.get("expression", ""))[:SHOWN],
        "options": [f"{letter}. {cells[letter][:SHOWN]}" for letter in "ABCDEFGHI" if cells.get(letter)],
        "truth": cells.get("answer", cells.get("bbox", ""))[:SHOWN],
        "prediction": answer[:SHOWN],
        "extracted": (score.extracted or "")[:SHOWN] if score else "",
        "hit": score.hit if score else None,
        "category": cells.get("category", ""),
    }


def _thumbnail(image: PIL.Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=75)
    return base64.b64encode(data.getvalue()).decode("ascii")
