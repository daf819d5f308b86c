"""Checkpoints that are damaged, hostile, or do not fit."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.platform import get_platform
from tests.helpers import tiny_training as tiny
from tests.helpers.tiny_training import whole_run as run

get_platform("cpu")

from megatron.driver import integrity, reading, storage  # noqa: E402
from megatron.driver.reading import read_checkpoint  # noqa: E402
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
    with pytest.raises(CheckpointError, match="names 7, but .*iter_0000007 is missing; .* holds iter_0000002"):
        run("--load", copied)
    with pytest.raises(CheckpointError, match="--ckpt-step names 9"):
        run("--load", copied, "--ckpt-step", "9")


def test_a_missing_or_truncated_file(copied):
    shard = next((copied / "iter_0000004").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="is damaged: .* bytes, .* were written"):
        run("--load", copied)
    shard.unlink()
    with pytest.raises(CheckpointError, match="is damaged: .* is missing"):
        run("--load", copied)
    _, _, state = run("--load", copied, "--ckpt-step", "2", train_iters=2, frozen=("embedding",))
    assert state.iteration == 2


def test_a_missing_frozen_folder(copied):
    (copied / "frozen").rename(copied / "elsewhere")
    with pytest.raises(CheckpointError, match="keeps its frozen parameters in .* which is missing"):
        run("--load", copied)


def test_changed_frozen_parameters(copied):
    """Same size, other bytes: the hash tells."""
    shard = next((copied / "frozen").glob("*/*.distcp"))
    checkpoint = read_checkpoint(copied)
    values = checkpoint.get("embedding.word_embeddings.weight").numpy().tobytes()
    data = shard.read_bytes()
    place = data.index(values)
    shard.write_bytes(data[: place + 3] + bytes([data[place + 3] ^ 1]) + data[place + 4 :])
    with pytest.raises(CheckpointError, match=r"checksums do not agree: __0_0.distcp has changed. Restore the files$"):
        run("--load", copied, frozen=("embedding",))
    integrity.write(shard.parent, {})  # somebody else's files, whole
    with pytest.raises(CheckpointError, match="the frozen parameters of .* have hash .* are damaged"):
        run("--load", copied, frozen=("embedding",))


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "common.pt", "rng.safetensors", storage.RUN_FILE])
def test_one_changed_byte_is_found(copied, name):
    file = copied / "iter_0000004" / name
    data = bytearray(file.read_bytes())
    place = data.index(b"consumed_samples") if name == storage.RUN_FILE else len(data) // 2
    place += 20 if name == storage.RUN_FILE else 0  # the second digit of 16
    data[place] ^= 1
    file.write_bytes(data)
    message = f"checksums do not agree: {name} has changed.*or load the iteration before it: --ckpt-step 2"
    message = "metadata is refused|" + message if name == ".metadata" else message
    for load in (lambda: run("--load", copied, frozen=("embedding",)), lambda: read_checkpoint(copied)):
        with pytest.raises(CheckpointError, match=message):
            load()
    _, _, state = run("--load", copied, "--ckpt-step", "2", train_iters=2, frozen=("embedding",))
    assert state.iteration == 2


def test_checksums_that_cannot_be_read(copied):
    file = copied / "iter_0000004" / storage.CHECKSUMS
    for content, message in (("{", "cannot be read"), ("{}", "does not name the files that are there")):
        file.write_text(content)
        with pytest.raises(CheckpointError, match=f"checksums.json {message}"):
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
        (json.dumps(content | {"format": 99}), "has format 99: expected 1"),
        (json.dumps(content | {"frozen": {"id": "../x"}}), "is no hash"),
        (json.dumps(content | {"files": [], "iteration": "4"}), "lacks iteration, files or has them in another form"),
    ):
        file.write_text(broken)
        with pytest.raises(CheckpointError, match=message):
            run("--load", copied)
    file.unlink()
    with pytest.raises(CheckpointError, match="is no checkpoint of this suite: run.json is missing"):
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


def test_pickles_that_would_run_code_are_refused(copied, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = copied / "iter_0000004"
    good = (folder / "common.pt").read_bytes()
    torch.save(Exploit(), folder / "common.pt")
    record_sizes(folder)
    integrity.write(folder, {})
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
