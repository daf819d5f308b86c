"""Targets: whole or not at all, never over something else; and sources that must not be written."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from checkpoint_converters import write
from checkpoint_converters.convert import convert
from checkpoint_converters.plan import Job, Output
from checkpoint_converters.stream import Runner, as_bytes
from checkpoint_converters.torch_zip import write_torch_zip
from checkpoint_converters.write import cut, write_folder
from mindspeed_mm.cli.convert import size
from mindspeed_mm.cli.main import main
from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.models.sources import open_source
from tests.checkpoint_converters.converter_helpers import assert_equal, tensors, write_llava

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def source(golden, tmp_path):
    """A tiny whole model."""
    return write_llava(tmp_path / "source", golden)


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def job(name, tensor):
    return Job((Output(name, tuple(tensor.shape), tensor.dtype),), lambda: [tensor])


DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(DTYPES, SHAPES), min_size=1, max_size=5))
def test_both_file_formats_hold_any_tensors(tmp_path_factory, wanted):
    folder = tmp_path_factory.mktemp("formats")
    state = {f"t{number}": torch.randn(shape).to(dtype) for number, (dtype, shape) in enumerate(wanted)}
    jobs = [job(name, tensor) for name, tensor in state.items()]
    write.write_safetensors(folder / "x.safetensors", jobs, Runner())
    write.write_torch(folder / "x.bin", jobs, Runner())
    for found in (
        load_file(folder / "x.safetensors"),
        torch.load(folder / "x.bin", weights_only=True),
        torch.load(folder / "x.bin", weights_only=True, mmap=True),
    ):
        assert_equal(dict(found), state)


def test_a_torch_file_is_the_same_bytes_each_time_and_aligned(tmp_path):
    outputs = [("a", (3,), torch.float32), ("b", (70,), torch.bfloat16)]
    values = [torch.ones(3), torch.ones(70, dtype=torch.bfloat16)]
    for name in ("1.pt", "2.pt"):
        write_torch_zip(tmp_path / name, outputs, map(as_bytes, values))
    data = (tmp_path / "1.pt").read_bytes()
    assert data == (tmp_path / "2.pt").read_bytes()
    assert data.find(values[1].view(torch.uint8).numpy().tobytes()) % 64 == 0


def test_jobs_are_cut_into_shards_in_order():
    jobs = [job(f"t{number}", torch.zeros(10)) for number in range(7)]
    assert [len(shard) for shard in cut(jobs, 80)] == [2, 2, 2, 1]
    assert [len(shard) for shard in cut(jobs, 1)] == [1] * 7


def test_a_tensor_that_changes_its_shape_is_refused(tmp_path):
    wrong = Job((Output("a", (2,), torch.float32),), lambda: [torch.zeros(3)])
    with pytest.raises(WeightError, match=r"a became \[3\] torch.float32; planned \[2\]"):
        write_folder(tmp_path, [wrong], Runner())


def test_an_earlier_conversion_is_replaced_only_when_asked(source, tmp_path):
    convert(source, tmp_path / "out", to="llava", shard_size=50_000)
    with pytest.raises(WeightError, match="out exists; expected a new folder or file. Give --overwrite"):
        convert(source, tmp_path / "out", to="llava-hf")
    convert(source, tmp_path / "out", to="llava-hf", overwrite=True)
    assert open_source(tmp_path / "out").layout == "llava-hf"
    assert not [name for name in listing(tmp_path / "out") if name.startswith("pytorch_model")]
    assert listing(tmp_path) == ["out", "source"]


def test_overwriting_never_removes_what_no_conversion_writes(source, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(WeightError, match="home holds thesis.tex, which no conversion writes"):
        convert(source, tmp_path / "home", to="llava", overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"


def test_parts_of_our_layout_join_one_folder(source, tmp_path):
    out = tmp_path / "out"
    convert(source, out, to="mindspeed-mm", parts=["vision_encoder"])
    convert(source, out, to="mindspeed-mm", parts=["text_decoder"])
    assert {"converted_clip.pt", "converted_vicuna.pt"} <= set(listing(out))
    with pytest.raises(WeightError, match="holds converted_clip.pt already; expected none of them"):
        convert(source, out, to="mindspeed-mm", parts=["vision_encoder"])
    convert(source, out, to="mindspeed-mm", parts=["vision_encoder"], overwrite=True)
    assert not [name for name in listing(out) if name.startswith(".")]


def test_symbolic_links_are_not_followed(source, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WeightError, match="is a symbolic link; expected a new path"):
        convert(source, tmp_path / "out", to="llava")
    assert not listing(tmp_path / "elsewhere")
    (tmp_path / "ours").mkdir()
    (tmp_path / "elsewhere" / "mlp.pt").write_text("mine")
    (tmp_path / "ours" / "mlp.pt").symlink_to(tmp_path / "elsewhere" / "mlp.pt")
    convert(source, tmp_path / "ours", to="mindspeed-mm", overwrite=True)
    assert (tmp_path / "elsewhere" / "mlp.pt").read_text() == "mine"
    assert not (tmp_path / "ours" / "mlp.pt").is_symlink()


def test_the_source_is_never_the_target(source):
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    for target in (source, source.parent):
        with pytest.raises(WeightError, match="holds the source .*; expected another folder"):
            convert(source, target, to="llava", overwrite=True)
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before


def test_a_read_only_folder_is_named(source, monkeypatch):
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 40}))
    refused = "Permission denied|Operation not permitted|Read-only file system"
    with pytest.raises(WeightError, match=f"cannot write /sys/kernel/out: ({refused})"):  # nobody makes folders there
        convert(source, "/sys/kernel/out", to="llava")


def test_a_folder_that_refuses_is_named(source, tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(WeightError, match="cannot write .*out: Permission denied; expected a writable folder"):
        convert(source, tmp_path / "out", to="llava")


def test_too_little_space_is_said_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(WeightError, match="the disk has 0.0 MB left"):
        convert(source, tmp_path / "out", to="llava")
    assert listing(tmp_path) == ["source"]


@pytest.mark.parametrize("to", ["llava-hf", "llava", "mindspeed-mm", "projector"])
def test_a_disk_that_fills_up_leaves_nothing(source, tmp_path, monkeypatch, to):
    def fill(self, jobs):
        raise OSError(28, "No space left on device")
        yield

    monkeypatch.setattr(Runner, "blocks", fill)
    with pytest.raises(WeightError, match="cannot write .*out: No space left on device"):
        convert(source, tmp_path / "out", to=to)
    assert listing(tmp_path) == ["source"]


def test_a_killed_run_leaves_nothing_that_looks_whole(source, tmp_path):
    program = (
        "import sys, time\n"
        "from checkpoint_converters import write\n"
        "from checkpoint_converters.convert import convert\n"
        "original = write.write_json\n"
        "def slow(*arguments):\n"
        "    sys.stdout.write('writing\\n'); sys.stdout.flush(); time.sleep(60)\n"
        "write.write_json = slow\n"
        f"convert({str(source)!r}, {str(tmp_path / 'out')!r}, to='llava', shard_size=50_000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0)
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", to="llava")  # what is left does not stand in the way


def test_nan_is_refused_by_name_and_written_only_when_asked(source, tmp_path, caplog):
    state = load_file(source / "model.safetensors")
    state["model.norm.weight"][3] = torch.inf
    save_file(state, source / "model.safetensors")
    with pytest.raises(WeightError, match="language_model.model.norm.weight has 1 NaN or Inf of 16 values"):
        convert(source, tmp_path / "out", to="llava-hf")
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", to="llava-hf", allow_nonfinite=True)
    assert "norm.weight has 1 NaN or Inf" in caplog.text


def test_a_type_too_narrow_for_the_values_is_refused(source, tmp_path):
    state = load_file(source / "model.safetensors")
    state["model.norm.weight"][3] = 1e6
    save_file(state, source / "model.safetensors")
    with pytest.raises(WeightError, match="as torch.float16; .* or a wider --dtype"):
        convert(source, tmp_path / "out", to="llava", dtype="fp16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "llava", "parts": ["text_decoder"]}, "holds a whole model; expected no choice of parts"),
        ({"to": "clip", "parts": ["text_decoder"]}, "layout clip has no text_decoder"),
        ({"to": "llava", "shard_size": 0}, "found shard size 0"),
    ],
)
def test_choices_that_make_no_sense(source, tmp_path, options, message):
    with pytest.raises(WeightError, match=message):
        convert(source, tmp_path / "out", **options)


def test_a_decoder_is_no_vision_encoder(golden, tmp_path):
    models = golden / "models"
    with pytest.raises(WeightError, match="found layout hf with text_decoder; expected a vision_encoder"):
        convert(models / "vicuna", tmp_path / "out", to="clip")
    with pytest.raises(WeightError, match="expected a vision_encoder"):
        convert({"vision_encoder": models / "vicuna"}, tmp_path / "out", to="clip")


def test_llava_hf_needs_a_tokenizer(source, golden, tmp_path):
    (source / "tokenizer.model").unlink()
    with pytest.raises(WeightError, match="llava-hf needs a tokenizer"):
        convert(source, tmp_path / "out", to="llava-hf")
    convert(source, tmp_path / "out", to="llava-hf", tokenizer=golden / "models" / "vicuna")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_damaged_tokenizer_is_named(tmp_path):
    from checkpoint_converters.fast_tokenizer import fast_tokenizer

    (tmp_path / "tokenizer.model").write_text("no")
    with pytest.raises(WeightError, match="is no SentencePiece model"):
        fast_tokenizer(tmp_path / "tokenizer.model")


def test_the_fast_tokenizer_is_that_of_transformers_4(golden):
    from checkpoint_converters.fast_tokenizer import fast_tokenizer

    folder = golden / "models" / "vicuna"
    assert fast_tokenizer(folder / "tokenizer.model") == json.loads((folder / "tokenizer.json").read_text())


def test_sizes_of_the_command_line():
    assert [size(text) for text in ("5GB", "1.5 mb", "700")] == [5 * 10**9, 1_500_000, 700]
    for text in ("0", "5TB", "-1", ""):
        with pytest.raises(Exception, match="expected a size such as 5GB"):
            size(text)


def test_the_command_takes_one_source_or_several(source, golden, tmp_path, capsys):
    models = golden / "models"
    parts = ["--text-decoder", models / "vicuna", "--projector", models / "mm_projector.bin"]
    command = ["convert", *parts, tmp_path / "out", "--to", "mindspeed-mm", "--dtype", "bf16", "--json"]
    assert main([str(word) for word in command]) == 0
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert main([str(word) for word in ["convert", *parts, source, tmp_path / "b", "--to", "hf"]]) == 1
    assert "expected --text-decoder --vision-encoder --projector --interaction and DST alone" in capsys.readouterr().err
    assert main(["convert", str(source), "--to", "hf"]) == 1
    assert issubclass(ConfigError, ValueError) and "expected SRC DST" in capsys.readouterr().err
