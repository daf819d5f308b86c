"""docs/models.md: what every family does, from cells that a test has tried, and what the parts state of themselves."""

from __future__ import annotations

from mindspeed_mm.models.part import SLOTS, all_parts
from mindspeed_mm.models.spec import all_families

COLUMNS = ("train", "pack", "TP", "PP", "CP", "convert in", "convert out", "generate", "evaluate")

HEAD = """# Models

This page is made by `tests/families/test_models_page.py`. The test tries every cell with a tiny model of the family
and fails when the page says something else; the message gives the right lines.

## Families
train: a step of all parts. pack: samples of several lengths in one row. TP, PP, CP: two tensor-, pipeline- or
context-parallel ranks. Each of these gives the same weights as one process without packing. convert: the layouts that
are read and written (docs/weights.md). generate: text from ids and images. evaluate: a benchmark.
"""

SLOT_HEAD = """
## Parts
A family takes any part of a slot, or those that it names. model_type is that of a part's config.json.
"""


def family_line(name: str, cells: dict[str, str]) -> str:
    """A family's line of the page; `cells` by column."""
    types = ", ".join(all_families()[name].model_types)
    return _line([name, types, *(cells[column] for column in COLUMNS)])


def page(lines: list[str]) -> str:
    """The page with the given lines of families."""
    shown = {line.split(" | ")[0].removeprefix("| ") for line in lines}
    parts = [_line(["slot", "model_id", "model_type", "its own folders", "families that name it"]), "|" + "---|" * 5]
    for slot in SLOTS:
        for name, part in sorted(all_parts(slot).items()):
            named = sorted(family.name for family in all_families().values() if family.model_ids.get(slot) == name)
            if named and not set(named) & shown:
                continue
            layouts = ", ".join(layout.name for layout in part.layouts) or ("hf" if slot == "text_decoder" else "-")
            parts.append(_line([slot, name, ", ".join(part.model_types) or "-", layouts, ", ".join(named) or "-"]))
    head = [_line(["family", "model_type", *COLUMNS]), "|" + "---|" * (len(COLUMNS) + 2)]
    return "\n".join([HEAD, *head, *lines, SLOT_HEAD, *parts, ""])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
