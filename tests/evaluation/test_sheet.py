import openpyxl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import sheet
from evaluation.pandas_rules import MAX_SHEET_CELL
from evaluation.sheet import is_cut, write_sheet

XML_TEXT = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\ufffe\uffff_"), min_size=1, max_size=20
)


def cells(path):
    return [list(row) for row in openpyxl.load_workbook(path).active.iter_rows()]


def values(path):
    return [[cell.value for cell in row] for row in cells(path)]


def test_texts_survive(tmp_path):
    texts = ["None", "NA", "=1+1", "14", "007", "#N/A", "TRUE", " x ", "a\nb\tc", "<&\"'>", "http://a.b", "\U0001f600"]
    write_sheet(tmp_path / "t.xlsx", ["index", "text"], enumerate(texts))
    rows = cells(tmp_path / "t.xlsx")
    assert [[cell.value for cell in row] for row in rows] == [["index", "text"], *map(list, enumerate(texts))]
    assert {row[1].data_type for row in rows[1:]} <= {"s", "inlineStr"}


def test_empty_cells_and_numbers(tmp_path):
    write_sheet(tmp_path / "t.xlsx", ["a", "b", "c"], [(1, "", None), (-5, "x", 0)])
    assert values(tmp_path / "t.xlsx") == [["a", "b", "c"], [1, None, None], [-5, "x", 0]]


def test_characters_that_xml_cannot_hold_are_spelled_out(tmp_path):
    write_sheet(tmp_path / "t.xlsx", ["a"], [("x\x00y\x1bz\r",), ("_x0041_",), ("\ud800",)])
    written = [row[0] for row in values(tmp_path / "t.xlsx")[1:]]
    assert [openpyxl.utils.escape.unescape(text) for text in written[:2]] == ["x\x00y\x1bz\r", "_x0041_"]
    assert written[2] == "_xD800_"


@pytest.mark.parametrize("letter", ["y", "\U0001f600", "\x00", "&"])
def test_long_texts_are_cut_and_say_so(tmp_path, letter):
    text = letter * (MAX_SHEET_CELL + 1)
    assert is_cut(text) and not is_cut("y" * MAX_SHEET_CELL)
    write_sheet(tmp_path / "t.xlsx", ["a"], [(text,)])
    written = openpyxl.utils.escape.unescape(values(tmp_path / "t.xlsx")[1][0])
    assert written.endswith(f"[cut here: {len(text)} characters, a cell holds 32767; the whole text is in the journal]")
    assert MAX_SHEET_CELL - 2 <= len(written.encode("utf-16-le")) // 2 <= MAX_SHEET_CELL


def test_equal_tables_give_equal_bytes(tmp_path):
    for name in ("a.xlsx", "b.xlsx"):
        write_sheet(tmp_path / name, ["a"], [("x",)])
    assert (tmp_path / "a.xlsx").read_bytes() == (tmp_path / "b.xlsx").read_bytes()


def test_too_many_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(sheet, "MAX_ROWS", 2)
    with pytest.raises(ValueError, match="more than the 2 rows of a sheet"):
        write_sheet(tmp_path / "t.xlsx", ["a"], [("x",), ("y",)])


@settings(max_examples=30, deadline=None)
@given(st.lists(XML_TEXT, min_size=1, max_size=5))
def test_any_text_survives(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("sheet") / "t.xlsx"
    write_sheet(path, ["a"], [(text,) for text in texts])
    assert [row[0] for row in values(path)[1:]] == texts
