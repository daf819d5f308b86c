"""Archives of TorchScript, as OpenAI published CLIP: read without torch.jit, and refused where they are damaged."""

import pickle
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindspeed_mm.errors import WeightError
from mindspeed_mm.models.sources import open_source
from mindspeed_mm.weights.torch_file import TorchFile
from tests.weights.weight_helpers import CallsCode


def test_torchscript_tensors_equal_those_of_torch(golden_models):
    path = golden_models / "clip_openai.pt"
    expected = torch.jit.load(str(path), map_location="cpu").state_dict()
    file = TorchFile(path)
    assert set(file.names) == set(expected)
    for name, tensor in expected.items():
        read = file.get(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor) and file.shape(name) == tuple(tensor.shape)


def rewrite(source, target, change):
    """Copy a zip archive with changed members: change(name, bytes) -> bytes or None to leave it out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)


def test_a_torchscript_pickle_that_calls_code_is_refused(golden_models, tmp_path):
    evil = pickle.dumps(CallsCode(), protocol=2)
    rewrite(
        golden_models / "clip_openai.pt",
        tmp_path / "evil.pt",
        lambda name, old: evil if name.endswith("data.pkl") else old,
    )
    with pytest.raises(WeightError, match=r"refused, because reading it would call \w+\.eval"):
        open_source(tmp_path / "evil.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, old: None if name.endswith("data/9") else old, "data/9"),
        (lambda name, old: old[:-4] if name.endswith("data/9") else old, "does not hold"),
        (lambda name, old: b"big" if name.endswith("byteorder") else old, "big-endian"),
        (lambda name, old: b"" if name.endswith("data.pkl") else old, "cut off or damaged"),
        (lambda name, old: b"\x80\x02K\x01K\x02\x85R." if name.endswith("data.pkl") else old, "not describe tensors"),
        (lambda name, old: None if name.endswith("data.pkl") else old, "0 data.pkl"),
        (lambda name, old: b"\x80\x02Nr\xff\xff\xff\xff." if name.endswith("data.pkl") else old, "numbers more values"),
    ],
)
def test_damaged_torchscript_is_refused(golden_models, tmp_path, change, message):
    rewrite(golden_models / "clip_openai.pt", tmp_path / "bad.pt", change)
    with pytest.raises(WeightError, match=message):
        part = open_source(tmp_path / "bad.pt").part("vision_encoder")
        for name in part.names:
            part.get(name)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 255))
def test_torchscript_changed_anywhere_never_crashes(golden_models, tmp_path_factory, where, value):
    def change(name, old):
        position = int(where * len(old))
        return old[:position] + bytes([value]) + old[position + 1 :] if name.endswith("data.pkl") else old

    path = tmp_path_factory.mktemp("changed") / "w.pt"
    rewrite(golden_models / "clip_openai.pt", path, change)
    try:
        part = open_source(path).part("vision_encoder")
        for name in part.names:
            part.get(name)
    except WeightError as error:
        assert "w.pt" in str(error)


def test_a_compressed_storage_is_refused(golden_models, tmp_path):
    with zipfile.ZipFile(golden_models / "clip_openai.pt") as old, zipfile.ZipFile(tmp_path / "z.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightError, match="does not hold"):
        open_source(tmp_path / "z.pt").part("vision_encoder").get("visual.class_embedding")
