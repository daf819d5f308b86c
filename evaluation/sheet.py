"""Write a table as .xlsx so that every text survives: none is taken for a formula, a number, a link or a missing value.

The file is written directly (ECMA-376, SpreadsheetML, inline strings) and has no time stamps: equal tables give equal
bytes. Characters that XML cannot hold are written in the standard's form _xHHHH_, which spreadsheets undo.
"""

import itertools
import math
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from evaluation.pandas_rules import MAX_SHEET_CELL

CUT_NOTE = "... [cut here: {length} characters, a cell holds {limit}; the whole text is in the journal]"
MAX_ROWS = 1_048_576
"""Rows of a sheet (Excel specifications and limits)."""

_UNSAFE = re.compile("_x[0-9A-Fa-f]{4}_|[\x00-\x08\x0b-\x1f\ufffe\uffff\ud800-\udfff]")
_FIRST_DATE = (1980, 1, 1, 0, 0, 0)
_MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"
_TYPE = "application/vnd.openxmlformats-officedocument.spreadsheetml"
_HEAD = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'

_PARTS = {
    "[Content_Types].xml": f'<Types xmlns="{_PACKAGE}/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Default Extension="xml" ContentType="application/xml"/>'
    f'<Override PartName="/xl/workbook.xml" ContentType="{_TYPE}.sheet.main+xml"/>'
    f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{_TYPE}.worksheet+xml"/></Types>',
    "_rels/.rels": f'<Relationships xmlns="{_PACKAGE}/relationships">'
    f'<Relationship Id="rId1" Type="{_OFFICE}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
    "xl/workbook.xml": f'<workbook xmlns="{_MAIN}" xmlns:r="{_OFFICE}">'
    '<sheets><sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
    "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{_PACKAGE}/relationships">'
    f'<Relationship Id="rId1" Type="{_OFFICE}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
}


def write_sheet(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str | float | None]]) -> None:
    """Write one sheet with a header line. Numbers become numbers, texts become texts, None an empty cell.

    A text longer than a cell can hold is cut and says so. Raises ValueError for more rows than a sheet holds.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in _PARTS.items():
            archive.writestr(_entry(name), _HEAD + content)
        with archive.open(_entry("xl/worksheets/sheet1.xml"), "w") as sheet:
            sheet.write(f'{_HEAD}<worksheet xmlns="{_MAIN}"><sheetData>'.encode())
            for number, row in enumerate(itertools.chain([columns], rows), start=1):
                if number > MAX_ROWS:
                    raise ValueError(f"{path}: the table has more than the {MAX_ROWS} rows of a sheet; split it.")
                sheet.write(f"<row>{''.join(map(_cell, row))}</row>".encode())
            sheet.write(b"</sheetData></worksheet>")


def is_cut(text: str) -> bool:
    """True for a text that does not fit into a cell."""
    return _sheet_length(text) > MAX_SHEET_CELL


def _cell(value: str | float | None) -> str:
    if value is None or value == "":
        return "<c/>"
    if isinstance(value, int | float):
        return f"<c><v>{value!r}</v></c>" if math.isfinite(value) else "<c/>"
    if is_cut(value):
        note = CUT_NOTE.format(length=len(value), limit=MAX_SHEET_CELL)
        units = value.encode("utf-16-le", "surrogatepass")[: 2 * (MAX_SHEET_CELL - len(note))]
        value = units.decode("utf-16-le", "ignore") + note
    text = escape(_UNSAFE.sub(_spell_out, value))
    return f'<c t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'


def _sheet_length(text: str) -> int:
    """Length in UTF-16 units, which is what the limit counts."""
    return len(text) + sum(character > "\uffff" for character in text)


def _spell_out(match: re.Match) -> str:
    """A character as _xHHHH_; a text that already looks so gets its underscore spelled out."""
    found = match[0]
    return f"_x{ord(found):04X}_" if len(found) == 1 else f"_x005F{found}"


def _entry(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _FIRST_DATE)
    info.compress_type = zipfile.ZIP_DEFLATED
    return info
