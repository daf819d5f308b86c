import json

import pytest

from evaluation.journal import Journal, fingerprint
from mindspeed_mm.errors import DataError

FACTS = {"weights": "a", "decoding": {"max_new_tokens": 4}}


def journal(folder, facts=FACTS, rank=0):
    return Journal(folder, facts, rank)


def write(folder, answers, **options):
    own = journal(folder, **options)
    for index, text in answers.items():
        own.append(index, text)
    own.close()


def only_file(folder):
    (path,) = folder.iterdir()
    return path


def test_answers_of_all_ranks_come_back(tmp_path):
    assert journal(tmp_path / "j").read() == {}
    write(tmp_path / "j", {1: "A", "x": "line\nbreak \u732b \ud800"})
    write(tmp_path / "j", {2: "B"}, rank=1)
    write(tmp_path / "j", {3: "C"})
    assert journal(tmp_path / "j", rank=5).read() == {1: "A", "x": "line\nbreak \u732b \ud800", 3: "C", 2: "B"}


def test_other_facts_are_never_mixed(tmp_path):
    write(tmp_path, {1: "A"})
    other = FACTS | {"weights": "b"}
    assert journal(tmp_path, other).read() == {}
    write(tmp_path, {1: "B"}, facts=other)
    assert journal(tmp_path).read() == {1: "A"}
    assert len(list(tmp_path.iterdir())) == 2
    assert fingerprint(FACTS) == fingerprint(dict(reversed(FACTS.items())))


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_an_unfinished_last_line_is_ignored_and_then_replaced(tmp_path, cut, caplog):
    write(tmp_path, {1: "A", 2: "B"})
    path = only_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-cut])
    assert journal(tmp_path).read() == {1: "A"}
    assert "unfinished" in caplog.text
    write(tmp_path, {3: "C"})
    assert journal(tmp_path).read() == {1: "A", 3: "C"}


def test_a_file_with_half_a_first_line_begins_anew(tmp_path):
    write(tmp_path, {1: "A"})
    path = only_file(tmp_path)
    path.write_bytes(path.read_bytes()[:10])
    assert journal(tmp_path).read() == {}
    write(tmp_path, {2: "B"})
    assert journal(tmp_path).read() == {2: "B"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [lines[0], b"{", lines[2]], "line 2 is damaged"),
        (lambda lines: [lines[0], b'{"index": 1}', lines[2]], "line 2 is no journal line"),
        (lambda lines: [lines[0], b"[]", lines[2]], "line 2 is no journal line"),
        (lambda lines: lines[1:], "line 1 is no journal line"),
        (lambda lines: [json.dumps({"facts": {}}).encode(), *lines[1:]], "its first line is not that of this run"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, message):
    write(tmp_path, {1: "A", 2: "B"})
    path = only_file(tmp_path)
    path.write_bytes(b"\n".join(change(path.read_bytes().split(b"\n"))))
    with pytest.raises(DataError, match=message):
        journal(tmp_path).read()


def test_a_very_long_unfinished_line(tmp_path):
    write(tmp_path, {1: "A"})
    path = only_file(tmp_path)
    path.write_bytes(path.read_bytes() + b"x" * 200_000)
    write(tmp_path, {2: "B"})
    assert journal(tmp_path).read() == {1: "A", 2: "B"}
