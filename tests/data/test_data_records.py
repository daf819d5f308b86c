"""Records of JSON lists and JSONL are found by place, whatever their layout; damage is named."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_mm.data import records as records_module
from mindspeed_mm.data.records import RecordFile
from mindspeed_mm.errors import DataError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
objects = st.lists(st.dictionaries(st.text(max_size=3), values, max_size=3), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(records=objects, indent=st.sampled_from([None, 1]), ascii_only=st.booleans(), lines=st.booleans())
def test_any_layout(tmp_path_factory, records, indent, ascii_only, lines):
    path = tmp_path_factory.mktemp("records") / "data.json"
    if lines:
        text = "\n\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records)
    else:
        text = " " + json.dumps(records, indent=indent, ensure_ascii=ascii_only) + "\n"
    path.write_text(text, encoding="utf-8")
    old = records_module.BLOCK_BYTES
    records_module.BLOCK_BYTES = 7  # every record meets the end of a block
    try:
        file = RecordFile(path)
    finally:
        records_module.BLOCK_BYTES = old
    assert [file[number] for number in range(len(file))] == records


def test_byte_order_mark_and_pickling(tmp_path):
    path = tmp_path / "data.json"
    for text in ('[{"a": 1}, {"a": "\u732b"}]', '{"a": 1}\n{"a": "\u732b"}\n'):
        path.write_text(text, encoding="utf-8-sig")
        file = RecordFile(path)
        assert file[1] == {"a": "\u732b"}
        assert pickle.loads(pickle.dumps(file))[0] == {"a": 1}


def test_check_sees_every_record(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    seen = []
    RecordFile(path, check=lambda record, where: seen.append((record["a"], where)))
    assert seen == [(1, f"{path}: record 0"), (2, f"{path}: record 1")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no records"),
        (b"[]", "holds no records"),
        (b" \n", "holds no records"),
        (b'[{"a": 1},\n{"a" 2}]', r"record 1 \(line 2\) cannot be parsed: Expecting ':'"),
        (b'[{"a": 1}\n{"a": 2}]', r"record 1 \(line 2\) cannot be parsed: expected a comma"),
        (b'[{"a": 1}, 3]', r"record 1 \(line 1\) cannot be parsed: expected an object, found '3'"),
        (b'[{"a": 1},]', "expected an object, found ']'"),
        (b'[{"a": 1}, {"a": [1, ', r"record 1 \(line 1\) cannot be parsed"),
        (b'[{"a": 1},', "expected an object, found 'the end of the file'"),
        (b'[{"a": 1}', "expected a comma or the list's end, found ''"),
        (b'[{"a": 1}] x', "the list has ended, yet 'x' follows"),
        (b'[{"a": "\xff"}]', "is not UTF-8 text"),
        (b'{"a": 1}\n{"a": \n', r"record 1 \(line 2\) cannot be parsed"),
        (b'{"a": 1}\n{"a": "\0"}\n', r"record 1 \(line 2\) cannot be parsed: Invalid control character"),
        (b'{"a": 1}\n[2]\n', r"record 1 is \[2\]; expected an object"),
        (b'{\n"a": 1}\n', r"record 0 \(line 1\) cannot be parsed.*one record per line"),
    ],
)
def test_damage(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        RecordFile(path)


def test_mixed_line_ends(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"a": 1}\r\n  {"a": 2}\n\r\n{"a": 3}')
    file = RecordFile(path)
    assert [file[number]["a"] for number in range(len(file))] == [1, 2, 3]


def test_problems_can_be_collected(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": 1}\n{"a"\n[1]\n{"a": 4}\n')
    problems = []
    file = RecordFile(path, problems=problems)
    assert [file[number]["a"] for number in range(len(file))] == [1, 4] and len(problems) == 2
    path.write_text('[{"a": 1}, {"a": 2} {"a": 3}]')
    file = RecordFile(path, problems=problems)
    assert len(file) == 2 and "expected a comma" in str(problems[-1])


def test_a_bar_shows_what_takes_long(tmp_path, monkeypatch, capsys):
    from mindspeed_mm.data import progress

    path = tmp_path / "data.jsonl"
    path.write_text('{"a": 1}\n' * 50)
    RecordFile(path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "QUIET_SECONDS", -1.0)
    RecordFile(path)
    assert "indexing data.jsonl" in capsys.readouterr().err


def test_unclosed_record_in_a_large_file(tmp_path, monkeypatch):
    monkeypatch.setattr(records_module, "BLOCK_BYTES", 16)
    monkeypatch.setattr(records_module, "MAX_RECORD_BYTES", 64)
    path = tmp_path / "data.json"
    path.write_text('[{"a": [' + "1, " * 1000)
    with pytest.raises(DataError, match="record 0 .line 1. cannot be parsed"):
        RecordFile(path)


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
