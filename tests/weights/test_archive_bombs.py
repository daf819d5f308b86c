"""Torch files of a few bytes that ask for gigabytes."""

import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch.jit._pickle

from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.sources import open_source


class Calls:
    """Pickled as the call of a function."""

    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


def archive(path, content, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", pickle.dumps(content, protocol=2))
        for name, data in members.items():
            file.writestr(f"x/{name}", data)
    return path


def test_a_member_that_unpacks_to_more_than_it_may(tmp_path):
    path = archive(tmp_path / "x.pt", {}, byteorder=bytes(10**7))
    assert path.stat().st_size < 20_000
    with pytest.raises(WeightError, match="its byteorder is larger than 6 bytes"):
        open_source(path)


def test_a_pickle_that_copies_one_list_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr("mindspeed_mm.weights.torch_file.MAX_ATTRIBUTES", 100)
    pairs = [(number, number) for number in range(60)]
    content = {name: Calls(OrderedDict, pairs) for name in "ab"}
    with pytest.raises(WeightError, match="more than 100 entries"):
        open_source(archive(tmp_path / "x.pt", content))


def test_what_builds_lists_copies_nothing(tmp_path):
    content = {"a": Calls(torch.jit._pickle.build_intlist, "text")}
    with pytest.raises(WeightError, match="found str under 'a'; expected a flat dict"):
        open_source(archive(tmp_path / "x.pt", content))
