"""What pandas makes of text cells, because VLMEvalKit reads its tables with it and so shapes prompts and scores.

pandas' reader turns some words into missing values and a whole column into numbers or booleans when every cell
that is left looks like one: "12" beside an empty cell becomes 12.0. VLMEvalKit scores what comes back from a
spreadsheet that it wrote, which applies the rules a second time. Checked against pandas 2.2.3 (openpyxl, xlsxwriter)
on random columns; numbers of 19 digits and more, where pandas' readers differ, are outside this copy.
"""

import math
import re
from collections.abc import Sequence

NA_TEXTS = frozenset(
    ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"]
    + ["NULL", "NaN", "None", "n/a", "nan", "null"]
)
"""Cells that pandas reads as missing (pandas documentation, read_csv, na_values)."""

Value = int | float | bool | str | None
"""A cell as pandas holds it; None is a missing value."""

MAX_SHEET_CELL = 32767
"""Longest text of a spreadsheet cell (Excel specifications and limits)."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f]")
_INTEGER = re.compile(r"\s*[+-]?[0-9]+\s*")
_FLOAT = re.compile(r"\s*[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|inf|infinity)\s*", re.IGNORECASE)
_MAX_DIGITS = 4000  # Python refuses to convert longer integers; no number needs as many
_BOOLEANS = {"True": True, "TRUE": True, "true": True, "False": False, "FALSE": False, "false": False}


def read_column(cells: Sequence[str]) -> list[Value]:
    """Values that pandas.read_csv gives for one column of text cells."""
    if {cell.lower() for cell in cells if cell not in NA_TEXTS} <= {"true", "false"}:
        return [None if cell in NA_TEXTS else cell.lower() == "true" for cell in cells]
    return _infer(cells)


def through_spreadsheet(values: Sequence[Value]) -> list[Value]:
    """Values that pandas.read_excel gives after pandas.to_excel wrote `values` as a column."""
    if any(isinstance(value, str) for value in values):
        return _infer(["" if value is None else _stored(str(value)) for value in values])
    present = [value for value in values if value is not None]
    if any(isinstance(value, bool) for value in present) and len(present) < len(values):
        return [None if value is None else float(value) for value in values]
    floats = [value for value in values if isinstance(value, float)]
    if floats and len(floats) == len(values) and all(math.isfinite(n) and n.is_integer() for n in floats):
        return [int(number) for number in floats]
    return list(values)


def seen(value: Value) -> str:
    """Text of a value as Python's str shows it to VLMEvalKit; a missing one is "nan"."""
    return "nan" if value is None else str(value)


def _infer(cells: Sequence[str]) -> list[Value]:
    present = [cell for cell in cells if cell not in NA_TEXTS]
    if not present:
        return [None] * len(cells)
    if all(_FLOAT.fullmatch(cell) for cell in present):
        if any(map(_overflows, present)):
            return [None if cell in NA_TEXTS else cell for cell in cells]
        integers = [int(cell) for cell in present if _INTEGER.fullmatch(cell)]
        if not _fits_64_bits(integers):
            return [None if cell in NA_TEXTS else cell for cell in cells]
        if len(integers) == len(cells):
            return list(integers)
        return [None if cell in NA_TEXTS else float(cell) for cell in cells]
    if all(cell in _BOOLEANS for cell in present):
        return [_BOOLEANS.get(cell) for cell in cells]
    return [None if cell in NA_TEXTS else cell for cell in cells]


def _fits_64_bits(integers: list[int]) -> bool:
    return all(-(2**63) <= n < 2**63 for n in integers) or all(0 <= n < 2**64 for n in integers)


def _overflows(cell: str) -> bool:
    return math.isinf(float(cell)) and "inf" not in cell.lower() or len(cell) > _MAX_DIGITS


def _stored(text: str) -> str:
    """What xlsxwriter, which pandas uses, leaves of a text: formulas become their stored result 0, a text ends at the
    longest cell of a sheet, and control characters are spelled out."""
    if text.startswith("=") or (text.startswith("{=") and text.endswith("}")):
        return "0"
    return _CONTROL.sub(lambda match: f"_x{ord(match[0]):04X}_", text[:MAX_SHEET_CELL])
