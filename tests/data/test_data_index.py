"""Indexes of large files are stored, mapped, shared, and built again when the file or what they depend on changes."""

import json
import logging
import multiprocessing
import os

import numpy as np
import pytest
from data_helpers import make_record

from mindspeed_mm.data import index as index_module
from mindspeed_mm.data.index import Index
from mindspeed_mm.data.records import RecordFile
from tests.helpers.media import dataset_of


@pytest.fixture(autouse=True)
def every_file_is_large(monkeypatch):
    monkeypatch.setattr(index_module, "SMALL_BYTES", 0)


def write(path, count=20):
    path.write_text("\n".join(json.dumps({"n": number}) for number in range(count)))


def scanned(path, folder):
    """(file, whether it was read for the places of its records)"""
    scans = []

    class Watched(RecordFile):
        def _index(self):
            scans.append(self.path)
            return super()._index()

    return Watched(path, index=Index(path, folder)), bool(scans)


def test_a_stored_index_is_taken(tmp_path):
    path, folder = tmp_path / "data.jsonl", tmp_path / "cache"
    write(path)
    first, read = scanned(path, folder)
    assert read
    second, read = scanned(path, folder)
    assert not read and isinstance(second._starts, np.memmap)
    assert [second[i] for i in range(20)] == [first[i] for i in range(20)]
    assert not [name for name in os.listdir(folder) if name.endswith(".new")]


@pytest.mark.parametrize("change", ["content", "time", "truncated index", "garbage index", "version"])
def test_a_stale_index_is_built_again(tmp_path, change, monkeypatch, caplog):
    path, folder = tmp_path / "data.jsonl", tmp_path / "cache"
    write(path)
    scanned(path, folder)
    (stored,) = [folder / name for name in os.listdir(folder) if name.endswith(".starts")]
    if change == "content":
        status = path.stat()
        path.write_text(path.read_text().replace('"n": 7', '"n": 8'))  # same size, same time
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "time":
        os.utime(path, ns=(1, 1))
    elif change == "truncated index":
        stored.write_bytes(stored.read_bytes()[:-8])
    elif change == "garbage index":
        stored.write_bytes(b"\0" * 9000)
    else:
        monkeypatch.setattr(index_module, "VERSION", 99)
    file, read = scanned(path, folder)
    assert read and file[7] == {"n": 8 if change == "content" else 7}
    assert not scanned(path, folder)[1]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    path = tmp_path / "data.jsonl"
    write(path)

    def refuse(*_arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(index_module, "_write", refuse)
    with caplog.at_level(logging.WARNING):
        file, read = scanned(path, tmp_path / "cache")
    assert read and file[3] == {"n": 3} and "is not stored" in caplog.text


def build(path, folder, queue):
    queue.put(scanned(path, folder)[1])


def test_several_processes_build_once(tmp_path):
    path = tmp_path / "data.jsonl"
    write(path, 2000)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=build, args=(path, tmp_path / "cache", queue)) for _ in range(4)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(results) == [False, False, False, True]


def test_lengths_are_stored_with_what_they_depend_on(make_config, tokenizer, tmp_path):
    records = [make_record(i, "red.png" if i % 2 else None, text="word " * (3 * i + 1)) for i in range(12)]
    folder = str(tmp_path / "cache")

    def lengths(template="v1", **policies):
        config = make_config(records, template_name=template, index_folder=folder, **policies)
        return dataset_of(config, tokenizer, 4, 150).sets[0].lengths

    dropped = lengths(overlong="drop")
    assert dropped.tolist() == lengths(overlong="drop").tolist()
    assert lengths(overlong="truncate").tolist() != dropped.tolist()
    assert lengths("llava_llama_2", overlong="drop").tolist() != dropped.tolist()
    assert len([name for name in os.listdir(folder) if name.endswith(".lengths")]) == 3
