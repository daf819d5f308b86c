"""The files of the feature cache: found again, never half-written, never more than there is room for."""

import errno
import os
import time
from types import SimpleNamespace

import pytest
import torch

from mindspeed_mm.data.feature_cache import UNFINISHED, FeatureCache, fingerprint, used_bytes
from mindspeed_mm.data.sample import ImageBytes

SHAPE = (4, 6)
FILE_BYTES = 4 * 6 * 2 + 4
KEY = FeatureCache.key(ImageBytes("a", b"image a"))
OTHER = FeatureCache.key(ImageBytes("b", b"image b"))


def cache(folder, room=1e6, name="f" * 64):
    return FeatureCache(folder, name, SHAPE, torch.bfloat16, room)


def features(seed=0):
    return torch.randn(*SHAPE, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_what_is_written_is_read(tmp_path):
    cache(tmp_path).write(KEY, features())
    assert torch.equal(cache(tmp_path).read(KEY), features())
    assert cache(tmp_path).read(OTHER) is None
    assert cache(tmp_path, name="0" * 64).read(KEY) is None
    assert used_bytes(tmp_path) == FILE_BYTES


def test_an_image_is_its_content(tmp_path):
    (tmp_path / "x.png").write_bytes(b"image a")
    assert FeatureCache.key(str(tmp_path / "x.png")) == KEY != OTHER


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: bytes([b[0] ^ 1]) + b[1:], lambda b: b""])
def test_a_damaged_file_is_made_again(tmp_path, caplog, monkeypatch, damage):
    monkeypatch.setattr("mindspeed_mm.data.feature_cache.logger.propagate", True)
    cache(tmp_path).write(KEY, features())
    (path,) = tmp_path.glob("*/*/*")
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level("WARNING"):
        assert cache(tmp_path).read(KEY) is None
    assert "is damaged" in caplog.text
    cache(tmp_path).write(KEY, features(1))
    assert torch.equal(cache(tmp_path).read(KEY), features(1))


def test_room_is_a_bound(tmp_path):
    full = cache(tmp_path, room=2 * FILE_BYTES - 1)
    full.write(KEY, features())
    full.write(OTHER, features())
    assert full.read(KEY) is not None and full.read(OTHER) is None
    assert used_bytes(tmp_path) == FILE_BYTES


def test_a_full_disk_ends_the_storing_only(tmp_path, caplog, monkeypatch):
    def full(*_paths):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mindspeed_mm.data.feature_cache.logger.propagate", True)
    monkeypatch.setattr("mindspeed_mm.data.feature_cache.os", SimpleNamespace(replace=full))
    refused = cache(tmp_path)
    with caplog.at_level("WARNING"):
        for key in (KEY, OTHER):
            refused.write(key, features())
    assert refused.read(KEY) is None and used_bytes(tmp_path) == 0
    (told,) = caplog.messages
    assert "No space left on device" in told and "encoded every time" in told


def test_a_folder_that_cannot_be_made_ends_the_storing_only(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("mindspeed_mm.data.feature_cache.logger.propagate", True)
    (tmp_path / ("f" * 64)).write_text("a file where the folder should be")
    refused = cache(tmp_path)
    with caplog.at_level("WARNING"):
        refused.write(KEY, features())
    assert refused.read(KEY) is None and "nothing more is stored" in caplog.text


def test_abandoned_files_go_and_young_ones_stay(tmp_path):
    cache(tmp_path).write(KEY, features())
    folder = next(tmp_path.glob("*/*"))
    old, young = folder / f"old{UNFINISHED}", folder / f"young{UNFINISHED}"
    for path in (old, young):
        path.write_bytes(b"12345")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    assert used_bytes(tmp_path) == FILE_BYTES + 5
    assert young.exists() and not old.exists()


def test_the_fingerprint_follows_weights_and_settings():
    weights = [("b", torch.ones(3, dtype=torch.bfloat16)), ("a", torch.zeros(2, 2))]
    first = fingerprint({"pad": True}, weights)
    assert first == fingerprint({"pad": True}, reversed(weights))
    changed = [
        fingerprint({"pad": False}, weights),
        fingerprint({"pad": True}, [("b", torch.ones(3, dtype=torch.bfloat16)), ("a", torch.eye(2))]),
        fingerprint({"pad": True}, [("b", torch.ones(3)), ("a", torch.zeros(2, 2))]),
    ]
    assert len({first, *changed}) == 4
