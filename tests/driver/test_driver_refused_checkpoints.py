"""Checkpoints that are damaged, hostile, or do not fit."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch

from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.platform import get_platform
from tests.helpers import tiny_training as tiny
from tests.helpers.tiny_training import whole_run as run

get_platform("cpu")

from megatron.driver.checkpoint import integrity, reading, storage  # noqa: E402
from megatron.driver.checkpoint.reading import read_checkpoint  # noqa: E402
from megatron.driver.state import Hooks  # noqa: E402

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run("--save", folder, "--save-interval", "2", frozen=("embedding",))
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    """A save folder that a test may damage."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("text", ["newest", "-3", "", "1.5", "\u0663"])
def test_nonsense_in_the_tracker(copied, text):
    (copied / storage.TRACKER).write_text(text)
    with pytest.raises(CheckpointError, match="expected the number of an iteration, or 'release'"):
        run("--load", copied)


def test_a_tracker_that_names_a_missing_folder(copied):
    (copied / storage.TRACKER).write_text("7")
    message = "names 7, but .*iter_0000007 is missing; whole iterations in .*: 2, 4; give one of them to --ckpt-step"
    with pytest.raises(CheckpointError, match=message):
        run("--load", copied)
    with pytest.raises(CheckpointError, match="--ckpt-step names 9"):
        run("--load", copied, "--ckpt-step", "9")
    for folder in copied.glob("iter_*"):
        shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="whole iterations in .*: none; give another folder"):
        run("--load", copied)


def go_on_from_2(copied):
    """What the messages offer."""
    _, _, state = run("--load", copied, "--ckpt-step", "2", train_iters=2, frozen=("embedding",))
    assert state.iteration == 2


OFFER = "Restore the files, or load the iteration before it: --ckpt-step 2"


def test_a_missing_or_truncated_file(copied):
    shard = next((copied / "iter_0000004").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=f"is damaged: .* bytes, .* were written. {OFFER}"):
        run("--load", copied)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"is damaged: .* is missing. {OFFER}"):
        run("--load", copied)
    go_on_from_2(copied)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "common.pt", storage.RUN_FILE, storage.CHECKSUMS])
def test_a_half_deleted_folder(copied, name):
    """`rm -r` was stopped: this file has gone already."""
    (copied / "iter_0000004" / name).unlink()
    with pytest.raises(CheckpointError, match=f"iter_0000004 .*{name} .*{OFFER}"):
        run("--load", copied)
    go_on_from_2(copied)


def test_an_empty_folder(copied):
    shutil.rmtree(copied / "iter_0000004")
    (copied / "iter_0000004").mkdir()
    with pytest.raises(CheckpointError, match=f"is no whole checkpoint of this suite: run.json is missing. {OFFER}"):
        run("--load", copied)


def test_the_tracker_was_set_back(copied, caplog):
    (copied / storage.TRACKER).write_text("2")
    go = ["--load", copied]
    run(*go, train_iters=2, frozen=("embedding",))
    assert "names 2, but there are newer iterations: 4; --ckpt-step 4 goes on from the last" in caplog.text
    caplog.clear()
    run(*go, "--ckpt-step", "2", train_iters=2, frozen=("embedding",))
    assert "newer iterations" not in caplog.text


def test_a_missing_frozen_folder(copied):
    (copied / "frozen").rename(copied / "elsewhere")
    with pytest.raises(CheckpointError, match="keeps its frozen parameters in .* which is missing"):
        run("--load", copied)


def other_frozen_values(copied):
    """One bit of a frozen parameter; returns its folder."""
    shard = next((copied / "frozen").glob("*/*.distcp"))
    values = read_checkpoint(copied).get("embedding.word_embeddings.weight").numpy().tobytes()
    data = shard.read_bytes()
    place = data.index(values)
    shard.write_bytes(data[: place + 3] + bytes([data[place + 3] ^ 1]) + data[place + 4 :])
    return shard.parent


def test_changed_frozen_parameters(copied):
    """Same size, other bytes: the hashes tell, whatever is frozen now."""
    folder = other_frozen_values(copied)
    with pytest.raises(CheckpointError, match=r"is damaged: __0_0.distcp has changed. Restore the files$"):
        run("--load", copied, frozen=("embedding",))
    integrity.write(folder, {})  # somebody else's files, whole
    for load in (lambda: run("--load", copied), lambda: read_checkpoint(copied)):
        with pytest.raises(CheckpointError, match="are not those that .*iter_0000004 was saved with: checksums.json"):
            load()


def load_on_this_rank(folder, flags):
    """The error's text."""
    args = tiny.arguments(*flags, "--load", folder, world_size=2)
    try:
        tiny.run(args, tiny.tiny_model(frozen=("embedding",)))
    except CheckpointError as error:
        return str(error)


LAYOUTS = [["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"], []]


@pytest.mark.parametrize("flags", LAYOUTS, ids=["TP2", "PP2", "DP2"])
def test_changed_frozen_parameters_at_another_layout(ranks, copied, flags):
    folder = other_frozen_values(copied)
    for said in ranks(2).run(load_on_this_rank, str(copied), flags):
        assert "is damaged: __0_0.distcp has changed" in said
    integrity.write(folder, {})
    for said in ranks(2).run(load_on_this_rank, str(copied), flags):
        assert "are not those that" in said


def save_on_this_rank(folder, flags):
    flags = [*flags, "--load", folder, "--save", folder]
    tiny.run(tiny.arguments(*flags, world_size=2, train_iters=6), tiny.tiny_model(frozen=("embedding",)))


@pytest.mark.parametrize("flags", LAYOUTS, ids=["TP2", "PP2", "DP2"])
def test_another_layout_does_not_store_frozen_parameters_again(ranks, copied, flags):
    before = list((copied / "frozen").iterdir())
    ranks(2).run(save_on_this_rank, str(copied), flags)
    assert list((copied / "frozen").iterdir()) == before
    assert read_checkpoint(copied).run["iteration"] == 6
    _, _, state = run("--load", copied, train_iters=7, frozen=("embedding",))
    assert state.iteration == 7


FILES = ["__0_0.distcp", ".metadata", "common.pt", "metadata.json", "rng.safetensors", storage.RUN_FILE]


@pytest.mark.parametrize("name", [*FILES, storage.CHECKSUMS, "frozen", storage.TRACKER])
def test_one_changed_byte_is_found(copied, name):
    """At random places, each bit of a byte alike; nothing of the file is trusted before its checksum was compared."""
    dice = random.Random(name)
    folders = {"frozen": next((copied / "frozen").iterdir()), storage.TRACKER: copied}
    folder = folders.get(name, copied / "iter_0000004")
    names = [file.name for file in folder.iterdir()] if name == "frozen" else [name]
    for number in range(4):
        file = folder / names[number % len(names)]
        kept = file.read_bytes()
        data = bytearray(kept)
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        file.write_bytes(data)
        message = f"is damaged: .*{OFFER}"
        if name == "frozen":
            message = "is damaged: .*has changed. Restore|are not those that .* Restore the folder"
        elif name == storage.TRACKER:
            message = "expected the number of an iteration|names .*whole iterations in .*: 2, 4; give one"
        if data.strip() != b"4":
            with pytest.raises(CheckpointError, match=message):
                run("--load", copied, frozen=("embedding",))
        file.write_bytes(kept)
    if name != "frozen":
        go_on_from_2(copied)


def test_a_changed_byte_is_found_without_a_run(copied):
    for name in FILES:
        file = copied / "iter_0000004" / name
        kept = file.read_bytes()
        file.write_bytes(kept[:40] + bytes([kept[40] ^ 4]) + kept[41:])
        with pytest.raises(CheckpointError, match=f"is damaged: {name} has changed"):
            read_checkpoint(copied)
        file.write_bytes(kept)


def test_checksums_that_cannot_be_read(copied):
    file = copied / "iter_0000004" / storage.CHECKSUMS
    good = json.loads(file.read_text())
    for content, message in (
        ("{", "checksums.json cannot be read"),
        ("[]", "checksums.json holds no names"),
        ("{}", "__0_0.distcp is not in checksums.json"),
        (json.dumps(good | {"other": "0"}), "other is missing"),
    ):
        file.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(copied)
    file.unlink()
    with pytest.raises(CheckpointError, match="checksums.json cannot be read: .*No such file"):
        read_checkpoint(copied)


def test_a_run_file_that_is_missing_or_foreign(copied):
    file = copied / "iter_0000004" / storage.RUN_FILE
    content = json.loads(file.read_text())
    for broken, message in (
        ("{", "cannot be read"),
        ("[]", "has format 'list'"),
        (json.dumps(content | {"format": 99}), "has format 99: expected 2"),
        (json.dumps(content | {"frozen": {"id": "../x"}}), "is no hash"),
        (json.dumps(content | {"files": [], "iteration": "4"}), "lacks iteration, files or has them in another form"),
    ):
        file.write_text(broken)
        integrity.write(file.parent, {})  # not by accident
        with pytest.raises(CheckpointError, match=message):
            run("--load", copied)


def test_another_architecture(copied):
    with pytest.raises(CheckpointError, match="has shape .*, the model has .*use the description"):
        run("--load", copied, width=32)
    with pytest.raises(CheckpointError, match=r"decoder.layers.2.*is missing \(it holds decoder.layers"):
        run("--load", copied, layers=3)
    with pytest.raises(CheckpointError, match="decoder.layers.1.* is not in the model"):
        run("--load", copied, layers=1)
    hooks = Hooks(compare=lambda extra: ["num_layers 2 -> 3"])
    with pytest.raises(CheckpointError, match="another architecture than the model: num_layers 2 -> 3"):
        run("--load", copied, hooks=hooks)


class Exploit:
    def __reduce__(self):
        return (os.mkdir, ("exploited",))


def record_sizes(folder):
    file = folder / storage.RUN_FILE
    content = json.loads(file.read_text())
    content["files"] = storage.sizes(folder)
    file.write_text(json.dumps(content))
    integrity.write(folder, {})


def test_pickles_that_would_run_code_are_refused(copied, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = copied / "iter_0000004"
    good = (folder / "common.pt").read_bytes()
    torch.save(Exploit(), folder / "common.pt")
    record_sizes(folder)
    with pytest.raises(CheckpointError, match="cannot be read: UnpicklingError"):
        run("--load", copied, frozen=("embedding",))
    (folder / "common.pt").write_bytes(good)
    (folder / ".metadata").write_bytes(pickle.dumps(Exploit()))
    record_sizes(folder)
    for read in (lambda: run("--load", copied), lambda: read_checkpoint(copied)):
        with pytest.raises(CheckpointError, match="metadata is refused: it asks for posix.mkdir"):
            read()
    assert not (tmp_path / "exploited").exists()


def test_metadata_that_is_no_description(copied):
    folder = copied / "iter_0000004"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    first = next(iter(metadata.storage_data.values()))
    object.__setattr__(first, "relative_path", "../../secret")
    for content, message in (
        (pickle.dumps({}), "it holds dict"),
        (b"\x80", "is refused"),
        (pickle.dumps(metadata), "it points to '../../secret', outside its folder"),
    ):
        (folder / ".metadata").write_bytes(content)
        record_sizes(folder)
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(copied)
    (folder / ".metadata").unlink()
    record_sizes(folder)
    with pytest.raises(CheckpointError, match="is no torch_dist checkpoint: .metadata is missing"):
        read_checkpoint(copied)


def test_metadata_that_is_too_large(copied, monkeypatch):
    monkeypatch.setattr(reading, "METADATA_LIMIT", 10)
    with pytest.raises(CheckpointError, match="metadata has .* bytes: expected at most 10"):
        read_checkpoint(copied)


def test_state_that_is_no_tensor_is_not_saved(tmp_path):
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    def provide(pre_process, post_process):
        model = tiny.tiny_model()(pre_process, post_process)
        plain = model.sharded_state_dict
        model.sharded_state_dict = lambda **kwargs: (
            plain(**kwargs) | {"counter": ShardedObject("counter", {1, 2}, (1,), (0,))}
        )
        return model

    with pytest.raises(CheckpointError, match="counter is set: only tensors can be saved"):
        tiny.run(tiny.arguments("--save", str(tmp_path)), provide)


def test_vocabulary_rows_may_differ_by_padding_only(copied):
    with pytest.raises(CheckpointError, match=r"output_layer.weight has shape \[32, 16\], the model has \[40, 16\]"):
        run("--load", copied, vocabulary=40)


def test_read_checkpoint_of_an_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint: latest_checkpointed_iteration.txt is missing"):
        read_checkpoint(tmp_path)


def test_a_release_gives_its_weights(copied):
    (copied / "iter_0000004").rename(copied / "release")
    (copied / storage.TRACKER).write_text("release")
    _, _, state = run("--load", copied, train_iters=1, frozen=("embedding",))
    assert state.iteration == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--load", "nothing"], r"nothing holds no checkpoint \(.*\): check the path. A new run leaves --load away"),
        (["--load", "nothing", "--save", "other"], r"nothing holds no checkpoint \(.*\): check the path"),
        (
            ["--load", "nothing", "--save", "nothing", "--finetune"],
            "from which --finetune takes weights: check the path",
        ),
        (
            ["--load", "nothing", "--save", "nothing", "--exit-on-missing-checkpoint"],
            "holds no checkpoint .*--exit-on-missing-checkpoint is given",
        ),
        (
            ["--load", "lost", "--save", "lost"],
            r"are there \(4, 5\): write 5 into that file to go on from the last one\). A new run would write",
        ),
        (["--pretrained-checkpoint", "lost"], r"are there \(4, 5\): write 5 into .* to take the last one\): check"),
    ],
)
def test_folders_that_should_hold_a_checkpoint(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    for name in ("iter_0000004", "iter_0000005"):  # their tracker is lost
        (tmp_path / "lost" / name).mkdir(parents=True)
        (tmp_path / "lost" / name / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match=message):
        run(*flags)
