"""The cache of objects: its limit, what goes first, files in use, versions, and folders that cannot be written."""

import os
import subprocess
import sys
import threading

import pytest

from mindspeed_mm.data.storage import cache
from mindspeed_mm.data.storage.cache import ObjectCache
from mindspeed_mm.data.storage.service import ObjectFacts
from mindspeed_mm.errors import ConfigError, DataError


@pytest.fixture
def small(tmp_path):
    return ObjectCache(tmp_path / "cache", 1000)


def held(cached):
    return sum(size for _, size, _ in cached._entries())


def facts(content, version="1"):
    return ObjectFacts(len(content), version, 1.0e9)


def test_an_image_is_fetched_once(small):
    asked = []
    fetch = lambda address: asked.append(address) or b"pixels"  # noqa: E731
    assert [small.image("s3://b/a", fetch) for _ in range(3)] == [b"pixels"] * 3
    assert asked == ["s3://b/a"] and (small.folder / "used").read_text() == "6"
    assert small.folder.stat().st_mode & 0o077 == 0


def test_what_was_not_used_for_longest_goes_first(small):
    for number in range(9):
        small.image(f"s3://b/{number}", lambda _: bytes(110))
        path = next(p for _, _, p in small._entries() if p.name == cache._name(f" s3://b/{number}"))
        os.utime(path, (number, number))
    small.image("s3://b/0", pytest.fail)  # used now
    small.image("s3://b/new", lambda _: bytes(110))
    there = {path.name for _, _, path in small._entries()}
    names = {number: cache._name(f" s3://b/{number}") in there for number in [*range(9), "new"]}
    assert held(small) <= 900 and names[0] and names["new"] and not names[1] and not names[2]
    assert int((small.folder / "used").read_text()) == held(small)


def test_several_processes_stay_within_the_limit(small):
    code = (
        "import sys; from pathlib import Path; from mindspeed_mm.data.storage.cache import ObjectCache\n"
        "c = ObjectCache(Path(sys.argv[1]), 1000)\n"
        "for n in range(60): c.image(f's3://b/{sys.argv[2]}/{n}', lambda _: bytes(90))"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(small.folder), name]) for name in "ab"]
    assert [process.wait(60) for process in running] == [0, 0]
    assert 500 <= held(small) <= 1000


def test_a_large_image_is_not_kept(small):
    assert len(small.image("s3://b/a", lambda _: bytes(2000))) == 2000
    assert not list(small._entries())


def test_a_data_file_in_use_stays_and_a_version_has_its_own(small):
    old = small.file("s3://b/train.jsonl", facts(b"1" * 500), lambda path: path.write_bytes(b"1" * 500))
    assert old.name == "train.jsonl" and old.stat().st_mtime == 1.0e9
    assert small.file("s3://b/train.jsonl", facts(b"1" * 500), pytest.fail) == old
    for number in range(10):
        small.image(f"s3://b/{number}", lambda _: bytes(100))
    assert old.exists() and held(small) <= 1000
    with pytest.raises(DataError, match=r"s3://b/train.jsonl has 600 bytes; with the data files in use .* the 1000"):
        small.file("s3://b/train.jsonl", facts(b"2" * 600, "2"), pytest.fail)
    new = small.file("s3://b/train.jsonl", facts(b"2" * 300, "2"), lambda path: path.write_bytes(b"2" * 300))
    assert new != old and new.read_bytes()[:1] == b"2"


def test_equal_addresses_of_two_stores_are_apart(tmp_path):
    first, second = (ObjectCache(tmp_path / "cache", 1000, store) for store in ("http://a", "http://b"))
    assert [first.image("s3://b/a", lambda _: b"1"), second.image("s3://b/a", lambda _: b"2")] == [b"1", b"2"]
    found = [own.file("s3://b/f", facts(b"12"), lambda path: path.write_bytes(b"12")) for own in (first, second)]
    assert found[0] != found[1]
    alone = ObjectCache(tmp_path / "own", 1000)
    alone.file("s3://b/f", facts(b"12"), lambda path: path.write_bytes(b"12"))
    assert alone.folder.stat().st_mode & 0o077 == 0


def test_a_data_file_that_nobody_holds_goes(small):
    path = small.file("s3://b/a", facts(b"1" * 500), lambda path: path.write_bytes(b"1" * 500))
    os.close(cache._held.pop(path))
    small.file("s3://b/b", facts(b"2" * 600), lambda path: path.write_bytes(b"2" * 600))
    assert not path.exists()


def test_two_threads_fetch_a_data_file_once(small):
    asked, found = [], []

    def fetch(path):
        asked.append(path)
        path.write_bytes(b"12")

    threads = [
        threading.Thread(target=lambda: found.append(small.file("s3://b/a", facts(b"12"), fetch))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(asked) == 1 and found[0] == found[1]


def test_a_file_that_was_cut_is_not_kept(small):
    with pytest.raises(DataError, match="s3://b/a gave 1 of 2 bytes; it has changed, or was cut"):
        small.file("s3://b/a", facts(b"12"), lambda path: path.write_bytes(b"1"))
    assert small.file("s3://b/a", facts(b"12"), lambda path: path.write_bytes(b"12")).read_bytes() == b"12"


def test_a_folder_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    blocked = ObjectCache(tmp_path / "file" / "below", 1000)
    assert blocked.image("s3://b/a", lambda _: b"1") == b"1" and "takes nothing more" in caplog.text
    with pytest.raises(DataError, match="s3://b/a cannot be stored in .*below: Not a directory; set MINDSPEED_MM_STOR"):
        blocked.file("s3://b/a", facts(b"1"), pytest.fail)


def test_size_and_folder_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv(cache.SIZE_VARIABLE, "1.5")
    found = ObjectCache.of_environment()
    assert (found.folder, found.limit) == (tmp_path, 1_500_000_000)
    for text in ("50GB", "-1", "inf", "nan"):
        monkeypatch.setenv(cache.SIZE_VARIABLE, text)
        with pytest.raises(ConfigError, match=f"{cache.SIZE_VARIABLE} is '{text}'; expected gigabytes as a number"):
            ObjectCache.of_environment()
