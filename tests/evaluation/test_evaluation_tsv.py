import base64
import csv

import pytest
from evaluation_helpers import choice_rows, image_cell, write_table
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from evaluation import tsv
from evaluation.tsv import read_table
from mindspeed_mm.errors import DataError


def test_cells_stay_text(tmp_path):
    rows = choice_rows(2)
    texts = {"A": "None", "B": "007", "C": "1.0", "question": 'a "quoted"\tand\nbroken line', "category": "=1+1"}
    rows[0].update(texts)
    table = read_table(write_table(tmp_path / "t.tsv", rows))
    assert {name: table.rows[0].cells[name] for name in texts} == texts
    assert "image" not in table.rows[0].cells
    assert [row.index for row in table.rows] == [0, 1]


def test_images_come_back_as_stored(tmp_path):
    rows = choice_rows(4)
    rows[0]["image"] = image_cell("blue", (5, 6), "P")
    rows[2]["image"] = repr([image_cell("red"), image_cell("green")])
    table = read_table(write_table(tmp_path / "t.tsv", rows))
    first, referring, several, referring_to_several = (table.images(row) for row in table.rows)
    assert [(image.mode, image.size) for image in first] == [("P", (5, 6))]
    assert referring[0].convert("RGB").getpixel((0, 0)) == (0, 0, 255)
    assert [image.getpixel((0, 0)) for image in several] == [(255, 0, 0), (0, 128, 0)]
    assert len(referring_to_several) == 2
    assert [row.image_count for row in table.rows] == [1, 1, 2, 2]


def test_rows_without_an_image_are_dropped_and_named(tmp_path):
    rows = choice_rows(4)
    rows[1]["image"], rows[3]["image"] = "", "nan"
    table = read_table(write_table(tmp_path / "t.tsv", rows))
    assert table.dropped == (1, 3)
    assert [row.index for row in table.rows] == [0, 2]
    assert len(table.all_cells) == 4


def test_images_from_files(tmp_path):
    Image.new("RGB", (2, 2), "red").save(tmp_path / "a.png")
    rows = [{"index": "x", "image_path": "a.png", "question": "?"}, {"index": "y", "image_path": "['a.png', 'a.png']"}]
    table = read_table(write_table(tmp_path / "t.tsv", [rows[0], rows[1] | {"question": "?"}]))
    assert [len(table.images(row)) for row in table.rows] == [1, 2]
    assert [row.index for row in table.rows] == ["x", "y"]


@pytest.mark.parametrize("texts", [["7", "07"], ["7", "a"], ["7", "-1"], ["7", "9" * 30]])
def test_indices_stay_text_unless_all_are_plain_integers(tmp_path, texts):
    rows = [row | {"index": text, "image": image_cell()} for row, text in zip(choice_rows(2), texts, strict=True)]
    assert [row.index for row in read_table(write_table(tmp_path / "t.tsv", rows)).rows] == texts


@settings(max_examples=40, deadline=None)
@given(
    cells=st.lists(
        st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12), min_size=1, max_size=6
    ),
    newline=st.sampled_from(["\n", "\r\n"]),
)
def test_any_text_survives(tmp_path_factory, cells, newline):
    path = tmp_path_factory.mktemp("any") / "t.tsv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator=newline, quoting=csv.QUOTE_ALL)
        writer.writerow(["index", "image", "question"])
        writer.writerows([str(i), image_cell(), cell] for i, cell in enumerate(cells))
    table = read_table(path)
    assert [row.cells["question"] for row in table.rows] == cells
    assert table.images(table.rows[-1])[0].size == (4, 3)


def test_byte_order_mark_and_blank_lines(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text(f"\ufeffindex\timage\n\n1\t{image_cell()}\n\n", encoding="utf-8")
    assert [row.index for row in read_table(path).rows] == [1]


def test_cell_limit_of_the_csv_module_is_put_back(table_path):
    before = csv.field_size_limit()
    read_table(table_path)
    assert csv.field_size_limit() == before


def with_cell(name, value):
    def change(rows):
        rows[1][name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_cell("index", "0"), r"index 0 is used by data rows 1 and 2"),
        (with_cell("index", ""), r"data row 2 has no index"),
        (with_cell("image", "5"), r'index 1: its image cell "5" refers to a row that does not exist'),
        (with_cell("image", "1"), r"refers to a row that holds no image of its own"),
        (with_cell("image", "!" * 80), r"index 1: the image is not base64"),
        (with_cell("image", image_cell()[:-1]), r"index 1: the image is not base64"),
        (with_cell("image", "[" + "x" * 80), r"the image list is not a Python list"),
        (with_cell("image", "[1, 2" + " " * 80 + "]"), r"must hold one or more texts"),
        (with_cell("image", "__import__('os')" + " " * 80), r"not base64"),
    ],
)
def test_damaged_rows_are_refused(tmp_path, change, message):
    rows = choice_rows(2)
    change(rows)
    with pytest.raises(DataError, match=message):
        read_table(write_table(tmp_path / "t.tsv", rows))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"index\timage\n", "has a header but no rows"),
        (b"index\timage\n1\t\n", "none of the 1 rows has an image"),
        (b"index\tquestion\n1\t2\n", "found columns index, question; expected index and image"),
        (b"index\timage\timage\n1\t2\t3\n", "column image is given twice"),
        (b"index\timage\n1\n", r"data row 1 has 1 cells; expected 2"),
        (b'index\timage\n1\t"abc\n', "is never closed"),
        (b"index\timage\n1\t\xff\n", "line 2 is not UTF-8"),
        (b"index\timage_path\n1\t../up.png\n", "lies outside"),
        (b"index\timage_path\n1\tno.png\n", "does not exist below .*; add it, or give .* --image-root"),
    ],
)
def test_unusable_files_are_refused(tmp_path, content, message):
    path = tmp_path / "t.tsv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_table(path)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="cannot read .*no.tsv"):
        read_table(tmp_path / "no.tsv")


def test_too_long_a_line(table_path, monkeypatch):
    monkeypatch.setattr(tsv, "MAX_CELL_CHARACTERS", 50)
    with pytest.raises(DataError, match=r"line 2 is longer than 50 bytes"):
        read_table(table_path)


def test_too_long_a_cell_of_many_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(tsv, "MAX_CELL_CHARACTERS", 50)
    path = tmp_path / "t.tsv"
    path.write_text('index\timage\n1\t"' + "short\n" * 20 + '"\n')
    with pytest.raises(DataError, match=r"line \d+: field larger than field limit \(50\)"):
        read_table(path)


def test_image_that_cannot_be_decoded(tmp_path):
    rows = choice_rows(1)
    rows[0]["image"] = base64.b64encode(b"no image " * 10).decode()
    table = read_table(write_table(tmp_path / "t.tsv", rows))
    with pytest.raises(DataError, match=r"row with index 0: the image cannot be decoded"):
        table.images(table.rows[0])


def test_image_that_is_too_large(table_path, monkeypatch):
    table = read_table(table_path)
    monkeypatch.setattr(tsv, "MAX_PIXELS", 11)
    with pytest.raises(DataError, match=r"4 x 3 pixels; at most 11"):
        table.images(table.rows[0])
