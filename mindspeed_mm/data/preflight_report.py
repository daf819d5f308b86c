"""What check-data found, as a table, a web page and JSON; and corrected records for images with wrong suffixes."""

from __future__ import annotations

import filecmp
import html
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mindspeed_mm.data.preflight import ERROR, KINDS, Found
from mindspeed_mm.data.records import RecordFile
from mindspeed_mm.errors import DataError, naming_file

BARS = 40
PERCENTILES = (1, 50, 90, 99, 100)
IMAGE_KEYS = ("image", "images", "path", "url", "image_url")
"""Keys under which records of any format name images."""

MOST_COUNTS = 8
"""Different values shown in a line of the table."""


def summary(name: str, found: Found) -> dict[str, Any]:
    """JSON-able account of one set."""
    return {
        "data_path": name,
        "records": found.records,
        "images": found.images,
        "text_only": found.images_per_sample.get(0, 0),
        "errors": found.errors,
        "warnings": found.warnings,
        "problems": {kind: found.problems[kind] for kind in KINDS if found.problems[kind]},
        "examples": {kind: found.examples.get(kind, []) for kind in KINDS if found.problems[kind]},
        "lengths": {template: _statistics(lengths) for template, lengths in found.lengths.items()},
        "supervised_tokens": _statistics(found.supervised),
        "turns": _histogram(found.turns),
        "images_per_sample": _histogram(found.images_per_sample),
        "image_modes": dict(found.modes.most_common()),
        "image_width": _statistics([width for width, _ in found.sizes]),
        "image_height": _statistics([height for _, height in found.sizes]),
        "longest": [{"tokens": tokens, "record": where} for tokens, where in found.longest],
        "largest_images": [{"pixels": pixels, "record": where} for pixels, where in found.largest],
    }


def _statistics(values: Sequence[int]) -> dict[str, float]:
    if not len(values):
        return {}
    array = np.asarray(values)
    result = {f"p{p}": int(np.percentile(array, p)) for p in PERCENTILES}
    return {"min": int(array.min()), **result, "mean": round(float(array.mean()), 1), "sum": int(array.sum())}


def _histogram(counter: dict[int, int]) -> dict[str, int]:
    return {str(key): counter[key] for key in sorted(counter)}


def print_table(sets: Sequence[dict[str, Any]], console: Console) -> None:
    """The summaries of all sets in readable form."""
    for account in sets:
        table = Table(title=account["data_path"], title_justify="left", show_header=False)
        table.add_column("what")
        table.add_column("value", overflow="fold")
        shapes = f"{account['records']} ({account['text_only']} without images, {account['images']} images)"
        table.add_row("records", shapes)
        for template, values in account["lengths"].items():
            table.add_row(f"tokens ({template})", _line(values))
        table.add_row("supervised tokens", _line(account["supervised_tokens"]))
        table.add_row("turns of a record", _counts(account["turns"]))
        table.add_row("images of a record", _counts(account["images_per_sample"]))
        if account["image_width"]:
            table.add_row("image width", _line(account["image_width"]))
            table.add_row("image height", _line(account["image_height"]))
            table.add_row("image formats", ", ".join(f"{key}: {n}" for key, n in account["image_modes"].items()))
        for kind, count in account["problems"].items():
            level, meaning = KINDS[kind]
            colour = "red" if level == ERROR else "yellow"
            table.add_row(f"[{colour}]{level}: {kind}[/]", f"{count}  ({meaning})")
            for example in account["examples"][kind][:3]:
                table.add_row("", f"[dim]{_escaped(example)}[/]")
        if not account["problems"]:
            table.add_row("[green]problems[/]", "none")
        console.print(table)


def _counts(histogram: dict[str, int]) -> str:
    shown = [f"{value}: {count}" for value, count in list(histogram.items())[:MOST_COUNTS]]
    return ", ".join(shown) + (", ..." if len(histogram) > MOST_COUNTS else "") or "-"


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


def _line(values: dict[str, float]) -> str:
    if not values:
        return "-"
    return ", ".join(f"{key} {values[key]}" for key in ("min", "p50", "mean", "p90", "p99", "p100"))


def write_page(path: Path, sets: Sequence[tuple[dict[str, Any], Found]], max_length: int) -> None:
    """One HTML file without outside references: figures, histograms, problems, the longest samples."""
    parts = [STYLE, "<h1>check-data</h1>"]
    for account, found in sets:
        parts.append(f"<h2>{html.escape(account['data_path'])}</h2>")
        rows = [("records", account["records"]), ("without images", account["text_only"])]
        rows += [("images", account["images"]), ("errors", account["errors"]), ("warnings", account["warnings"])]
        parts.append(_html_table(("", ""), rows))
        for template, lengths in found.lengths.items():
            parts.append(f"<h3>Tokens of a sample, template {html.escape(template)}</h3>")
            parts.append(histogram(lengths, max_length) + f"<p>{_line(account['lengths'][template])}</p>")
        parts.append("<h3>Supervised tokens of a sample</h3>" + histogram(found.supervised, None))
        if account["problems"]:
            problems = [
                (kind, KINDS[kind][0], count, "\n".join(account["examples"][kind][:20]))
                for kind, count in account["problems"].items()
            ]
            parts.append("<h3>Problems</h3>" + _html_table(("kind", "level", "count", "examples"), problems))
        parts.append("<h3>Longest samples</h3>" + _html_table(("tokens", "record"), found.longest))
        parts.append("<h3>Largest images</h3>" + _html_table(("pixels", "record"), found.largest))
    write_whole(path, "\n".join(parts) + "\n")


STYLE = """<!doctype html><meta charset="utf-8"><title>check-data</title>
<style>body{font:14px sans-serif;margin:2em;max-width:70em}td,th{padding:.2em .8em;text-align:left;vertical-align:top;
white-space:pre-wrap;border-bottom:1px solid #ddd;overflow-wrap:anywhere}svg{background:#f6f6f6}</style>"""


def _html_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


def histogram(values: Sequence[int], limit: int | None) -> str:
    """SVG bars of how often values occur; a red line at `limit`."""
    if not len(values):
        return "<p>none</p>"
    counts, edges = np.histogram(values, bins=BARS, range=(0, max(max(values), limit or 1)))
    width, height = 800, 160
    step = width / BARS
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{height - height * n / counts.max():.1f}" width="{step - 1:.1f}" '
        f'height="{height * n / counts.max():.1f}" fill="#46a"><title>{edges[i]:.0f} to {edges[i + 1]:.0f}: {n}</title>'
        "</rect>"
        for i, n in enumerate(counts)
    )
    place = 0 if limit is None else width * limit / edges[-1]
    line = "" if limit is None else f'<line x1="{place:.1f}" x2="{place:.1f}" y1="0" y2="{height}" stroke="red"/>'
    axis = f'<text x="0" y="{height + 15}">0</text><text x="{width - 50}" y="{height + 15}">{edges[-1]:.0f}</text>'
    return f'<svg width="{width}" height="{height + 20}">{bars}{line}{axis}</svg>'


def write_whole(path: Path, text: str) -> None:
    """Write beside, then rename."""
    beside = path.with_name(path.name + ".new")
    try:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files may be any bytes
        os.replace(beside, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}. Choose another place.") from error


def fix_suffixes(data_path: Path, folder: str, suffixes: dict[str, str]) -> Path:
    """Write a copy of a data file whose image names have the right suffixes; the file itself stays as it is.

    `suffixes` are found by check-data: path of an image -> suffix. Where no file of the new name exists, the image is
    linked (or copied) to it, so that other data files keep working; where another image has that name already, the
    suffix is put behind the whole name. Returns the copy's path. Raises DataError for a file that is no JSON or JSONL,
    and for a damaged record.
    """
    if data_path.suffix == ".parquet":
        raise DataError(f"--fix-suffix rewrites JSON and JSONL, not {data_path}. Convert it to JSONL first.")
    target = data_path.with_name(f"{data_path.stem}.fixed{data_path.suffix}")
    names = {image: _fixed_name(Path(image), suffix) for image, suffix in suffixes.items()}
    records = RecordFile(data_path)
    with data_path.open("rb") as file:
        as_list = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["
    beside = target.with_name(target.name + ".new")
    with naming_file(target), beside.open("w", encoding="utf-8") as file:
        file.write("[\n" if as_list else "")
        for number in range(len(records)):
            line = json.dumps(_renamed(records.verified(number), folder, names), ensure_ascii=False)
            file.write(line + (",\n" if as_list and number < len(records) - 1 else "\n"))
        file.write("]\n" if as_list else "")
    os.replace(beside, target)
    return target


def _fixed_name(image: Path, suffix: str) -> str:
    """The name (without its folder) under which an image is found with the right suffix; it is linked there."""
    new = image.with_suffix(suffix)
    if not image.exists():
        return new.name  # check-data has found the image under that name
    if new.exists() and not filecmp.cmp(image, new, shallow=False):
        new = image.with_name(image.name + suffix)
    if not new.exists():
        try:
            os.link(image, new)
        except OSError:  # another file system, or one without links
            shutil.copyfile(image, new)
    return new.name


def _renamed(value: Any, folder: str, names: dict[str, str], is_name: bool = False) -> Any:
    """A record with new image names; texts that happen to read like one stay as they are."""
    if isinstance(value, dict):
        return {key: _renamed(inner, folder, names, key in IMAGE_KEYS) for key, inner in value.items()}
    if isinstance(value, list):
        return [_renamed(inner, folder, names, is_name) for inner in value]
    if is_name and isinstance(value, str) and len(value) < 4096:
        name = names.get(os.path.normpath(os.path.join(os.path.abspath(folder), value)))
        return value if name is None else str(Path(value).with_name(name))
    return value
