import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.pandas_rules import MAX_SHEET_CELL, read_column, seen, through_spreadsheet

# Right sides noted from pandas 2.2.3: read_csv, then to_excel (xlsxwriter) and read_excel (openpyxl), then str().
COLUMNS = [
    (["1", "2"], ["1", "2"], ["1", "2"]),
    (["12", ""], ["12.0", "nan"], ["12.0", "nan"]),
    (["1.0", "2.0"], ["1.0", "2.0"], ["1", "2"]),
    (["1.5", "2", "NA"], ["1.5", "2.0", "nan"], ["1.5", "2.0", "nan"]),
    (["007", "+5", " 1"], ["7", "5", "1"], ["7", "5", "1"]),
    (["1", "a"], ["1", "a"], ["1", "a"]),
    (["None", "null", "x"], ["nan", "nan", "x"], ["nan", "nan", "x"]),
    (["TRUE", "false"], ["True", "False"], ["True", "False"]),
    (["tRuE"], ["True"], ["True"]),
    (["True", ""], ["True", "nan"], ["1.0", "nan"]),
    (["inf", "1"], ["inf", "1.0"], ["inf", "1.0"]),
    (["1e400", "1"], ["1e400", "1"], ["1e400", "1"]),
    (["1e5", "2"], ["100000.0", "2.0"], ["100000", "2"]),
    (["=1+1", "a"], ["=1+1", "a"], ["0", "a"]),
    (["{=A1}", "a"], ["{=A1}", "a"], ["0", "a"]),
    (["1,000", "12%"], ["1,000", "12%"], ["1,000", "12%"]),
    (["A\r", "x\x0by"], ["A\r", "x\x0by"], ["A_x000D_", "x_x000B_y"]),
    (["", "nan"], ["nan", "nan"], ["nan", "nan"]),
    ([" x ", "n/a"], [" x ", "nan"], [" x ", "nan"]),
]


@pytest.mark.parametrize(("cells", "read", "back"), COLUMNS)
def test_columns_as_pandas_reads_them(cells, read, back):
    values = read_column(cells)
    assert [seen(value) for value in values] == read
    assert [seen(value) for value in through_spreadsheet(values)] == back


def test_answers_written_as_text_are_numbers_when_all_look_like_one():
    assert [seen(value) for value in through_spreadsheet(["1", "", "2"])] == ["1.0", "nan", "2.0"]
    assert [seen(value) for value in through_spreadsheet(["1", "A"])] == ["1", "A"]


def test_long_text_ends_at_the_cell():
    assert through_spreadsheet(["y" * (MAX_SHEET_CELL + 1), "z"]) == ["y" * MAX_SHEET_CELL, "z"]


def test_very_long_digits_do_not_raise():
    cells = ["9" * 5000, "1"]
    assert read_column(cells) == cells


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["", "NA", "1", "2.0", "x", "True", "=1", "1e3"]) | st.text(max_size=5), max_size=6))
def test_length_is_kept_and_only_known_words_are_missing(cells):
    values = read_column(cells)
    assert len(values) == len(through_spreadsheet(values)) == len(cells)
    assert [value is None for value in values] == [seen(value) == "nan" for value in values]
