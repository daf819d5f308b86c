"""After a killed conversion; archives beyond 4 GB; the progress bar; the order of the command line."""

import io
import os
import sys
import zipfile

import pytest
import torch

import mindspeed_mm as mm
from checkpoint_converters import progress, torch_zip, write
from checkpoint_converters.convert import convert
from checkpoint_converters.stream import as_bytes
from mindspeed_mm.cli.main import main
from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.sources import open_source
from tests.checkpoint_converters.converter_helpers import assert_equal, tensors, write_llava

DEAD = 2**22 + 7
"""A process number that Linux never gives."""


@pytest.fixture
def source(golden, tmp_path):
    """A tiny whole model."""
    return write_llava(tmp_path / "source", golden)


def test_a_target_that_was_moved_aside_comes_back(source, tmp_path, caplog):
    convert(source, tmp_path / "out", to="llava")
    expected = tensors(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / f".out.{DEAD}.old")
    (tmp_path / f".out.{DEAD}.part").mkdir()
    with pytest.raises(WeightError, match=rf"rename .*\.out.{DEAD}.old to .*out"):
        open_source(tmp_path / "out")
    with pytest.raises(WeightError, match="out exists; expected a new folder"):
        convert(source, tmp_path / "out", to="llava")
    assert "out is back: a conversion that was to replace it was interrupted" in caplog.text
    assert_equal(tensors(tmp_path / "out"), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_rests_of_killed_conversions_are_removed_and_those_of_running_ones_kept(source, tmp_path):
    convert(source, tmp_path / "out", to="llava")
    (tmp_path / f".out.{DEAD}.old").mkdir()
    (tmp_path / f".out.{DEAD}.part").write_text("half a file")
    (tmp_path / ".out.1.part").mkdir()
    convert(source, tmp_path / "out", to="llava", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.1.part", "out", "source"]


def test_rests_of_killed_conversions_into_a_folder_that_exists(source, tmp_path):
    convert(source, tmp_path / "out", to="mindspeed-mm")
    (tmp_path / "out" / f".convert.{DEAD}.part").mkdir()
    before = sorted(path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith("."))
    convert(source, tmp_path / "out", to="mindspeed-mm", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def test_a_joined_folder_does_not_look_whole_while_parts_of_two_models_lie_in_it(source, tmp_path, monkeypatch):
    convert(source, tmp_path / "out", to="mindspeed-mm")
    original, moved = os.replace, []

    def killed(old, new):
        if moved:
            raise KeyboardInterrupt
        moved.append(new)
        original(old, new)

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(write, "write_json", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", to="mindspeed-mm", overwrite=True)
    assert not (tmp_path / "out" / "model.json").exists()


def test_archives_beyond_four_gigabytes(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_zip, "LARGE", 100)
    monkeypatch.setattr(torch_zip, "MARK", 2**32 - 1)
    state = {"a": torch.randn(100), "b": torch.randn(3), "c": torch.randn(50).half()}
    outputs = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()]
    torch_zip.write_torch_zip(tmp_path / "x.pt", outputs, map(as_bytes, state.values()), record={})
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.testzip() is None and len(archive.namelist()) == 7
    for mapped in (False, True):
        assert_equal(torch.load(tmp_path / "x.pt", weights_only=True, mmap=mapped), state)


def test_the_bar_shows_bytes_speed_and_what_remains(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    times = iter([0.0, 1.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    with progress.bytes_bar("convert to llava", 4_000_000) as advance:
        advance(1_000_000)
        assert not stream.getvalue()  # short work shows nothing
        advance(1_000_000)
        advance(2_000_000)
    text = stream.getvalue()
    assert "convert to llava" in text and "4.0/4.0 MB" in text and "0:00" in text


@pytest.mark.parametrize("order", ["{s} {d} --to llava", "{s} --to llava {d}", "--to llava {s} {d}"])
def test_paths_and_flags_in_any_order(source, tmp_path, order):
    assert main(["convert", *order.format(s=source, d=tmp_path / "out").split()]) == 0
    assert open_source(tmp_path / "out").layout == "llava"


def test_a_wrong_flag_is_still_refused(source, tmp_path, capsys):
    assert main(["convert", str(source), "--to", "llava", str(tmp_path / "out"), "--overwrit"]) == 1
    assert "--overwrit" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_vision_encoder_of_the_hub_that_is_not_here(source, tmp_path):
    text = (source / "config.json").read_text().replace('"vision_encoder"', '"openai/clip-vit-large-patch14-336"')
    (source / "config.json").write_text(text)
    state = {name: tensor for name, tensor in _load(source).items() if "vision_tower" not in name}
    _save(source, state)
    with pytest.raises(
        WeightError, match="Put the path of the encoder's folder or file into mm_vision_tower .*--vision"
    ):
        mm.load(source, device="cpu")
    parts = {"text_decoder": source, "vision_projector": source, "vision_encoder": source / "vision_encoder"}
    mm.convert(parts, tmp_path / "out", to="llava")
    assert len(open_source(tmp_path / "out").parts) == 3


def test_a_disk_that_is_full(source, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "check_space", lambda *_: None)

    def fill(_file, _data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "write_all", fill)
    with pytest.raises(WeightError, match="cannot write .*out: No space left on device"):
        convert(source, tmp_path / "out", to="llava-hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def _load(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def _save(folder, state):
    from safetensors.torch import save_file

    save_file(state, folder / "model.safetensors")
