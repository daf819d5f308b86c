"""Records of JSON lists and JSONL are found by place, whatever their layout; damage is named."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_mm.data import record_starts
from mindspeed_mm.data.records import RecordFile
from mindspeed_mm.errors import DataError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
objects = st.lists(st.dictionaries(st.text(max_size=3), values, max_size=3), min_size=1, max_size=5)


def whole(path, **options):
    """All records of a file, as they are read for the first time."""
    file = RecordFile(path, **options)
    return [file.verified(number) for number in range(len(file))]


@pytest.fixture(scope="module")
def layout_path(tmp_path_factory):
    """One file for all examples: a folder for each of them takes longer than the test."""
    return tmp_path_factory.mktemp("records") / "data.json"


@settings(max_examples=60, deadline=None)
@given(records=objects, indent=st.sampled_from([None, 1]), ascii_only=st.booleans(), lines=st.booleans())
def test_any_layout(layout_path, records, indent, ascii_only, lines):
    path = layout_path
    if lines:
        text = "\n\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records)
    else:
        text = " " + json.dumps(records, indent=indent, ensure_ascii=ascii_only) + "\n"
    path.write_text(text, encoding="utf-8")
    old = record_starts.BLOCK_BYTES
    record_starts.BLOCK_BYTES = 7  # every record meets the end of a block
    try:
        file = RecordFile(path)
    finally:
        record_starts.BLOCK_BYTES = old
    assert [file[number] for number in range(len(file))] == records
    assert whole(path) == records


def test_byte_order_mark_and_pickling(tmp_path):
    path = tmp_path / "data.json"
    for text in ('[{"a": 1}, {"a": "\u732b"}]', '{"a": 1}\n{"a": "\u732b"}\n'):
        path.write_text(text, encoding="utf-8-sig")
        file = RecordFile(path)
        assert file[1] == {"a": "\u732b"}
        assert pickle.loads(pickle.dumps(file))[0] == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no records; expected a JSON list or JSONL of records such as {.id.: .1."),
        (b"[]", "holds no records"),
        (b" \n", "holds no records"),
        (
            b'[{"a": 1},\n{"a" 2}]',
            r"record 1 \(line 2, byte 6\) cannot be parsed: Expecting ':' .*, near .*such as",
        ),
        (b'[{"a": 1}\n{"a": 2}]', r"record 1 \(line 2, byte 1\) cannot be parsed: expected a comma"),
        (b'[{"a": 1}, 3]', "record 1 is 3; expected an object, such as"),
        (b'[{"a": 1},]', "expected a record behind the comma"),
        (b'[{"a": 1}, {"a": [1, ', r"record 1 \(line 1, byte 22\) cannot be parsed"),
        (b'[{"a": 1},', "record 1 .* cannot be parsed: Expecting value"),
        (b'[{"a": 1}', "expected a comma or the list's end, found ''"),
        (b'[{"a": 1}] x', "the list has ended, yet 'x' follows"),
        (b'[{"a": "\xff"}]', r"record 0 \(line 1, byte 9\) cannot be parsed: it is not UTF-8 text"),
        (b'{"a": 1}\n{"a": \n', r"record 1 \(line 2, byte 6\) cannot be parsed"),
        (b'{"a": 1}\n{"a": "\0"}\n', r"record 1 \(line 2, byte 8\) cannot be parsed: there are NUL bytes"),
        (b'{"a": 1}\n\0\0\0', r"record 1 \(line 2, byte 1\) cannot be parsed: there are NUL bytes"),
        (b'{"a": 1}\n[2]\n', r"record 1 is \[2\]; expected an object"),
        (b'{\n"a": 1}\n', r"record 0 \(line 1, byte 2\) cannot be parsed.*one record per line"),
        (b'{"a": 1} {"a": 2}', r"record 0 \(line 1, byte 10\) cannot be parsed: something follows the record"),
        (b'{"a": 1},\n{"a": 2}', "something follows the record in its line"),
        (b'{"a": "\xed\xa0\x80"}', "record 0 .* it is not UTF-8 text"),
        ('{"a": 1}'.encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"record 0 \(line 1, byte 1\) cannot be parsed: Exceeds the limit"),
        (b'{"a": ' + b"[" * 100_000, r"record 0 \(line 1, byte 1\) cannot be parsed: maximum recursion"),
    ],
)
def test_damage(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        whole(path)


@pytest.mark.parametrize("block", [1, 3, 4096])
def test_mixed_line_ends(tmp_path, monkeypatch, block):
    monkeypatch.setattr(record_starts, "BLOCK_BYTES", block)
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\r\n{"a": 1}\r\n  {"a": 2}\n\r\n \t \r{"a": 3}\r{"a": 4} \n  ')
    assert [record["a"] for record in whole(path)] == [1, 2, 3, 4]


def test_problems_can_be_collected(tmp_path):
    path = tmp_path / "data.json"
    problems = []
    path.write_text('[{"a": 1}, {"a": 2} {"a": 3}]')
    assert len(whole(path, problems=problems)) == 2 and "expected a comma" in str(problems[-1])
    path.write_text("[]")
    assert not whole(path, problems=problems) and "holds no records" in str(problems[-1])


def test_a_bar_shows_what_takes_long(tmp_path, monkeypatch, capsys):
    from mindspeed_mm.data import progress

    path = tmp_path / "data.jsonl"
    path.write_text('{"a": 1}\n' * 50)
    RecordFile(path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "QUIET_SECONDS", -1.0)
    RecordFile(path)
    assert "indexing data.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [('[{"a": [' + "1, " * 1000, "Expecting"), ('{"a": "' + "1" * 200 + '"}', "it is 209 bytes long, which no")],
)
def test_a_record_of_impossible_size(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(record_starts, "BLOCK_BYTES", 16)
    monkeypatch.setattr(record_starts, "MAX_RECORD_BYTES", 64)
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(DataError, match=f"record 0 .line 1, byte .* cannot be parsed: {message}"):
        whole(path)


def test_missing_and_changed_files(tmp_path):
    with pytest.raises(DataError, match="cannot read the data file .*none.json: No such file"):
        RecordFile(tmp_path / "none.json")
    with pytest.raises(DataError, match="cannot read the data file"):
        RecordFile(tmp_path)
    path = tmp_path / "data.json"
    path.write_text('[{"a": 1}]')
    file = RecordFile(path)
    path.write_text("[]")
    with pytest.raises(DataError, match="the file has changed since the start"):
        file[0]
