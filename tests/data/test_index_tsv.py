"""A JSON index as TSV files: the same content by Python's json, in little memory, and after an interruption."""

import json
import random
import tracemalloc

import pytest

from mindspeed_mm.cli.main import main
from mindspeed_mm.data import index_tsv
from mindspeed_mm.data.index_tsv import index_to_tsv
from mindspeed_mm.errors import DataError


def rows_of(count):
    draw = random.Random(0)
    texts = ["a cat", 'a "dog", {tail}', "zwei\tWörter\n und 猫", "[x] \\ 🙂", ""]
    return [
        {"url": f"https://x/{n}.jpg", "caption": draw.choice(texts), "other": [n, {"a": None}]} for n in range(count)
    ]


def write(path, rows, form):
    if form == "lines":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows))
    else:
        path.write_text("\ufeff " + json.dumps(rows, indent=1 if form == "indented" else None))
    return path


def read(folder):
    lines = []
    for path in sorted(folder.glob("*.tsv")):
        head, *body = path.read_text().splitlines()
        assert head == "url\tcaption"
        lines += body
    return lines


def wanted(rows):
    return ["\t".join(" ".join(row[key].split()) for key in ("url", "caption")) for row in rows]


@pytest.mark.parametrize("form", ["one line", "indented", "lines"])
def test_the_same_as_json(tmp_path, form):
    rows = rows_of(257)
    source = write(tmp_path / "index.json", rows, form)
    assert index_to_tsv(source, tmp_path / "out", rows=100) == {"records": 257, "files": 3}
    assert read(tmp_path / "out") == wanted(rows)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert index_to_tsv(source, tmp_path / "out", rows=100)["records"] == 257  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert index_to_tsv(source, tmp_path / "even", rows=257) == {"records": 257, "files": 1}


@pytest.mark.parametrize("form", ["one line", "lines"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_it_goes_on_where_it_was_cut_short(tmp_path, form, after, monkeypatch):
    rows = rows_of(95)
    source = write(tmp_path / "index.json", rows, form)
    real, calls = index_tsv._write, []

    def cut(path, text):
        if len(calls) == after:
            raise KeyboardInterrupt  # behind a file that is complete, before the note of it
        calls.append(path)
        real(path, text)

    monkeypatch.setattr(index_tsv, "_write", cut)
    with pytest.raises(KeyboardInterrupt):
        index_to_tsv(source, tmp_path / "out", rows=20)
    monkeypatch.setattr(index_tsv, "_write", real)
    if after == 0:
        (tmp_path / "out" / "00000.tsv").unlink()  # no note of it: refused, as a folder of other data would be
    index_to_tsv(source, tmp_path / "out", rows=20)
    assert read(tmp_path / "out") == wanted(rows)


def test_memory_does_not_follow_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("mindspeed_mm.data.record_starts.BLOCK_BYTES", 2**14)
    rows = [row | {"caption": row["caption"] * 800} for row in rows_of(600)]
    source = write(tmp_path / "index.json", rows, "one line")
    tracemalloc.start()
    index_to_tsv(source, tmp_path / "out", rows=100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 2**20 < source.stat().st_size / 3


def test_refused(tmp_path, capsys):
    good = write(tmp_path / "good.json", rows_of(5), "one line")

    def refused(message, source, folder="new", **options):
        with pytest.raises(DataError, match=message):
            index_to_tsv(source, tmp_path / folder, **options)

    refused("No such file", tmp_path / "none.json")
    (tmp_path / "cut.json").write_text(good.read_text()[:-30])
    refused(r"record 4: (not JSON at byte|expected)", tmp_path / "cut.json", "a")
    (tmp_path / "comma.json").write_text('[{"url": "a", "caption": "b"} {"url": 1}]')
    refused("record 1: expected a comma or the list's end at byte", tmp_path / "comma.json", "b")
    (tmp_path / "empty.json").write_text(" []")
    refused("holds no records; expected objects with url, caption", tmp_path / "empty.json", "c")
    refused(r"record 0 has text None; expected a text. Name its keys with --columns", good, "d", columns=["text"])
    index_to_tsv(good, tmp_path / "e", rows=2)
    refused("the folder was begun with .*'rows': 2.*found .*'rows': 3", good, "e", rows=3)
    (tmp_path / "e" / "progress.json").write_text("{")
    refused("progress.json is damaged", good, "e", rows=2)
    (tmp_path / "e" / "progress.json").unlink()
    refused("holds .*.tsv and no progress.json; expected an empty folder", good, "e", rows=2)
    (tmp_path / "bad.jsonl").write_text('{"url": "a", "caption": "b"}\n{"url": \n')
    refused("record 1 is not JSON", tmp_path / "bad.jsonl", "f")
    assert main(["convert-data", str(good), str(tmp_path / "g"), "--to", "tsv", "--seed", "1"]) == 1
    assert "--seed has no meaning with --to tsv" in capsys.readouterr().err
    assert main(["convert-data", str(good), str(good), str(tmp_path / "g"), "--to", "tsv"]) == 1
    assert "found 2 files" in capsys.readouterr().err
    assert main(["convert-data", str(good), str(tmp_path / "g"), "--to", "tsv", "--rows", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["files"] == 2
