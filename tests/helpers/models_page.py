"""docs/models.md: what every family does, from cells that a test has tried, and what the parts state of themselves."""

from __future__ import annotations

from mindspeed_mm.models.part import SLOTS, all_parts
from mindspeed_mm.models.spec import all_families

COLUMNS = ("train", "pack", "TP", "PP", "CP", "convert in", "convert out", "generate", "evaluate")

HEAD = """# Models

This page is made by `tests/families/test_models_page.py`. The test tries every cell with a tiny model of the family
and fails when the page says something else; the message then names a file with the right page.

## Families
train: a step of all parts. pack: samples of several lengths in one row. TP, PP, CP: two tensor-, pipeline- or
context-parallel ranks. Each of these gives the same weights as one process without packing. convert: the layouts that
are read and written (docs/weights.md). generate: text from ids and images. evaluate: a benchmark.
"""

SLOT_HEAD = """
## Parts
A family takes any part of a slot, or those that it names. model_type is that of a part's config.json.
"""


def page(cells: dict[str, dict[str, str]]) -> str:
    """The page; `cells` are the columns of each family."""
    families = all_families()
    rows = [["family", "model_type", *COLUMNS]]
    for name in sorted(cells):
        types = ", ".join(families[name].model_types)
        rows.append([name, types, *(cells[name][column] for column in COLUMNS)])
    parts = [["slot", "model_id", "model_type", "its own folders", "families that name it"]]
    for slot in SLOTS:
        for name, part in sorted(all_parts(slot).items()):
            named = [family.name for family in all_families().values() if family.model_ids.get(slot) == name]
            if named and not set(named) & set(cells):
                continue
            layouts = ", ".join(layout.name for layout in part.layouts) or ("hf" if slot == "text_decoder" else "-")
            parts.append([slot, name, ", ".join(part.model_types) or "-", layouts, ", ".join(sorted(named)) or "-"])
    return "\n".join([HEAD, _table(rows), SLOT_HEAD, _table(parts), ""])


def _table(rows: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])
