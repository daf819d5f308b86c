"""One process: saving, resuming, beginning from other weights, and what is refused."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.platform import get_platform
from tests.helpers import tiny_training as tiny

get_platform("cpu")

from megatron.driver import checkpointing, reading, storage  # noqa: E402
from megatron.driver.initialize import shutdown  # noqa: E402
from megatron.driver.reading import read_checkpoint  # noqa: E402
from megatron.driver.state import Hooks  # noqa: E402

pytestmark = pytest.mark.usefixtures("single_process")

PRECISIONS = [[], ["--bf16"], ["--fp16", "--initial-loss-scale", "1024"]]


def run(*flags, train_iters=4, hooks=None, step=tiny.forward_step, **model):
    """A whole run from process group to shut-down: (snapshot, report, state)."""
    args = tiny.arguments(*map(str, flags), train_iters=train_iters)
    try:
        state, report = tiny.run(args, tiny.tiny_model(**model), hooks, step)
        return tiny.snapshot(state), report, state
    finally:
        shutdown()


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def losses(folder):
    keys = ("iteration", "loss", "grad_norm", "learning_rate", "consumed_samples", "loss_scale")
    return [[record[key] for key in keys] for record in tiny.records(folder)]


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda flags: flags[0] if flags else "fp32")
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, precision):
    common = [*precision, "--lr-decay-style", "cosine", "--lr-warmup-fraction", "0.2"]
    whole, _, _ = run(*common, "--save", tmp_path / "whole", train_iters=20, dropout=0.1)
    run(*common, "--save", tmp_path / "cut", "--exit-interval", "10", train_iters=20, dropout=0.1)
    resumed, report, _ = run(
        *common, "--save", tmp_path / "cut", "--load", tmp_path / "cut", train_iters=20, dropout=0.1
    )
    assert report.iteration == 20
    assert_equal(whole, resumed)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


class Killed(BaseException):
    pass


def killed_at(iteration):
    calls = []

    def step(data_iterator, model):
        calls.append(None)
        if len(calls) > 2 * iteration:  # two micro-batches per step
            raise Killed
        return tiny.forward_step(data_iterator, model)

    return step


def test_resumed_after_a_kill_equals_uninterrupted(tmp_path):
    whole, _, _ = run("--save", tmp_path / "whole", train_iters=8)
    with pytest.raises(Killed):
        run("--save", tmp_path / "cut", "--save-interval", "3", train_iters=8, step=killed_at(5))
    assert [record["iteration"] for record in tiny.records(tmp_path / "cut")] == [1, 2, 3, 4, 5]
    resumed, _, _ = run("--save", tmp_path / "cut", "--load", tmp_path / "cut", train_iters=8)
    assert_equal(whole, resumed)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_a_killed_save_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(Killed):
        original = storage.publish

        def publish(final):
            if final.name == "iter_0000004":
                raise Killed
            original(final)

        patched.setattr(storage, "publish", publish)
        run("--save", tmp_path, "--save-interval", "2")
    assert (tmp_path / storage.TRACKER).read_text() == "2"
    assert (tmp_path / ".iter_0000004.saving").is_dir()
    whole, _, _ = run()
    resumed, _, _ = run("--save", tmp_path, "--load", tmp_path)
    assert_equal(whole, resumed)
    assert sorted(os.listdir(tmp_path)) == ["iter_0000002", "iter_0000004", storage.TRACKER, "metrics.jsonl"]


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    run("--save", tmp_path, "--exit-interval", "2")

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpointing.dist_checkpointing, "save", full)
        with pytest.raises(CheckpointError, match="iteration 4 could not be saved .*No space left.*before are whole"):
            run("--save", tmp_path, "--load", tmp_path)
    assert read_checkpoint(tmp_path).run["iteration"] == 2


def test_a_checkpoint_that_was_being_replaced_is_put_back(tmp_path):
    run("--save", tmp_path, "--exit-interval", "2")
    os.rename(tmp_path / "iter_0000002", tmp_path / ".iter_0000002.replaced")
    _, report, _ = run("--save", tmp_path, "--load", tmp_path)
    assert report.iteration == 4


def test_saving_an_iteration_again_replaces_it(tmp_path):
    run("--save", tmp_path)
    first = read_checkpoint(tmp_path).get("output_layer.weight")
    run("--save", tmp_path, "--lr", "0.5")
    assert not torch.equal(first, read_checkpoint(tmp_path).get("output_layer.weight"))
    assert sorted(os.listdir(tmp_path)) == ["iter_0000004", storage.TRACKER, "metrics.jsonl"]


def test_the_tracker_picks_the_iteration(tmp_path):
    run("--save", tmp_path, "--save-interval", "1")
    (tmp_path / storage.TRACKER).write_text("3\n")
    _, _, state = run("--load", tmp_path, train_iters=3)
    assert (state.iteration, state.consumed_samples) == (3, 12)
    _, _, state = run("--load", tmp_path, "--ckpt-step", "1", train_iters=1)
    assert state.iteration == 1


def test_finished_runs_have_nothing_to_do(tmp_path, caplog):
    run("--save", tmp_path)
    _, report, _ = run("--save", tmp_path, "--load", tmp_path)
    assert report.loss is None and report.checkpoint is None
    assert "nothing to do: 4 of --train-iters 4 steps are done" in caplog.text


def test_without_optimizer_state_the_schedule_goes_on(tmp_path):
    flags = ["--lr-warmup-iters", "2", "--save", tmp_path]
    run(*flags, "--exit-interval", "4", "--no-save-optim", "--no-save-rng", train_iters=6)
    run(*flags, "--load", tmp_path, "--no-load-optim", "--no-load-rng", train_iters=6)
    rates = [record["learning_rate"] for record in tiny.records(tmp_path)]
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.0075, 0.005, 0.0025])
    assert not any("rng" in name or "optim" in name for name in os.listdir(tmp_path / "iter_0000004"))


def test_wanted_optimizer_state_must_be_there(tmp_path):
    run("--save", tmp_path, "--no-save-optim")
    with pytest.raises(CheckpointError, match="holds no optimizer state.*give --no-load-optim"):
        run("--load", tmp_path, train_iters=6)


def test_optimizer_state_must_fit_what_is_trained(tmp_path):
    run("--save", tmp_path, frozen=("decoder",))
    with pytest.raises(CheckpointError, match="optimizer state of .* does not fit.*exp_avg.decoder.* is missing"):
        run("--load", tmp_path, train_iters=6)


def test_optimizer_state_of_another_precision(tmp_path):
    run("--save", tmp_path)
    with pytest.raises(CheckpointError, match="saved with another setting of --bf16: use the same, or give"):
        run("--load", tmp_path, "--bf16", train_iters=6)
    _, report, _ = run("--load", tmp_path, "--bf16", "--no-load-optim", train_iters=6)
    assert report.iteration == 6


def test_finetune_takes_the_weights_only(tmp_path):
    saved, _, _ = run("--save", tmp_path)
    taken, _, state = run("--load", tmp_path, "--finetune", "--lr", "0", train_iters=1)
    assert (state.iteration, state.consumed_samples) == (1, 4)
    for name in saved:
        if not name.startswith("optimizer"):
            assert torch.equal(saved[name], taken[name]), name


@pytest.mark.parametrize("precision", [[], ["--bf16"]])
def test_stage_2_begins_with_the_weights_of_stage_1(tmp_path, precision):
    """What is frozen differs: stage 1 trains the output layer, stage 2 the decoder."""
    one, two = tmp_path / "one", tmp_path / "two"
    saved, _, _ = run(*precision, "--save", one, frozen=("decoder", "embedding"))
    flags = [*precision, "--pretrained-checkpoint", one, "--save", two, "--load", two, "--lr", "0"]
    taken, _, state = run(*flags, "--exit-interval", "1", train_iters=2, frozen=("output", "embedding"))
    assert state.iteration == 1
    for name in saved:
        if not name.startswith("optimizer"):
            assert torch.equal(saved[name], taken[name]), name
    _, _, state = run(*flags, train_iters=2, frozen=("output", "embedding"))
    assert state.iteration == 2  # --load holds a checkpoint now, --pretrained-checkpoint is not used again


def test_frozen_parameters_are_stored_once(tmp_path):
    run("--save", tmp_path, "--save-interval", "1", frozen=("decoder",))
    folders = list((tmp_path / "frozen").iterdir())
    assert len(folders) == 1
    stamp = folders[0].stat().st_mtime_ns
    run("--save", tmp_path, "--load", tmp_path, "--save-interval", "1", train_iters=6, frozen=("decoder",))
    assert [(folder, folder.stat().st_mtime_ns) for folder in (tmp_path / "frozen").iterdir()] == [(folders[0], stamp)]
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.run["frozen"]["id"] == folders[0].name
    trained = [name for name, reader in checkpoint.sources.items() if reader.path == checkpoint.path]
    assert sorted(trained) == ["embedding.word_embeddings.weight", "output_layer.weight"]


def test_read_checkpoint_gives_full_tensors_by_plain_names(tmp_path):
    saved, _, _ = run("--save", tmp_path, frozen=("embedding",), hooks=Hooks(extra=lambda: {"model": {"width": 16}}))
    for folder in (tmp_path, tmp_path / "iter_0000004"):
        checkpoint = read_checkpoint(folder)
        assert checkpoint.run["extra"] == {"model": {"width": 16}}
        for name in ("embedding.word_embeddings.weight", "decoder.layers.1.mlp.linear_fc1.weight"):
            assert torch.equal(checkpoint.get(name), saved[name])
            assert checkpoint.shape(name) == tuple(saved[name].shape)
        assert not any(name.startswith("optimizer") for name in checkpoint.names)
    with pytest.raises(CheckpointError, match="holds no tensor 'nothing'"):
        checkpoint.get("nothing")


def test_flags_win_over_the_checkpoints_schedule_with_a_warning(tmp_path, caplog):
    run("--save", tmp_path, train_iters=4)
    run("--save", tmp_path, "--load", tmp_path, "--lr", "0.5", train_iters=6)
    assert tiny.records(tmp_path)[4]["learning_rate"] == pytest.approx(0.5 * 2 / 6)
    assert "max_lr 0.01 -> 0.5, lr_decay_steps 4 -> 6" in caplog.text


def test_the_checkpoints_schedule_can_be_kept(tmp_path):
    flags = ["--save", tmp_path, "--lr-decay-iters", "8"]
    run(*flags)
    keep = "--use-checkpoint-opt-param-scheduler"
    run("--save", tmp_path, "--load", tmp_path, "--lr", "0.5", keep, train_iters=6)
    assert tiny.records(tmp_path)[4]["learning_rate"] == pytest.approx(0.01 * 4 / 8)


def test_load_without_a_checkpoint_starts_from_scratch(tmp_path, caplog):
    _, report, _ = run("--load", tmp_path / "nothing")
    assert report.iteration == 4
    assert "holds no checkpoint" in caplog.text
    with pytest.raises(CheckpointError, match="holds no checkpoint .*--exit-on-missing-checkpoint is given"):
        run("--load", tmp_path / "nothing", "--exit-on-missing-checkpoint")
    with pytest.raises(CheckpointError, match="--pretrained-checkpoint .* holds no checkpoint"):
        run("--pretrained-checkpoint", tmp_path / "nothing")


def test_a_fresh_run_into_a_used_folder_warns(tmp_path, caplog):
    run("--save", tmp_path)
    run("--save", tmp_path)
    assert "this run starts from scratch and replaces" in caplog.text
    assert [record["iteration"] for record in tiny.records(tmp_path)] == [1, 2, 3, 4]


def test_save_must_be_writable_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="--save .*file/save cannot be written to"):
        run("--save", tmp_path / "file" / "save")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    get_platform("cpu")
    run("--save", folder, "--save-interval", "2", frozen=("embedding",))
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    """A save folder that a test may damage."""
    import shutil

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
    with pytest.raises(CheckpointError, match="the frozen parameters of .* have hash .* are damaged"):
        run("--load", copied, frozen=("embedding",))


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


def test_damaged_metrics_are_cut(tmp_path, caplog):
    run("--save", tmp_path, "--save-interval", "2")
    file = tmp_path / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]) + "\0\0{\n" + lines[3])
    run("--save", tmp_path, "--load", tmp_path, "--ckpt-step", "2")
    assert [record["iteration"] for record in tiny.records(tmp_path)] == [1, 2, 3, 4]
    assert "the records after iteration 2 are damaged and dropped" in caplog.text


def test_killed_by_the_system_and_resumed(tmp_path):
    """kill -9 of a process of its own, wherever it happens to be."""
    whole, _, _ = run("--save", tmp_path / "whole", "--save-interval", "2", train_iters=40)
    cut = tmp_path / "cut"
    flags = ["--save", str(cut), "--load", str(cut), "--save-interval", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.tiny_training", "0.02", "40", *flags], cwd=Path(__file__).parents[2]
    )
    try:
        while not (cut / "iter_0000006").exists():
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert int((cut / storage.TRACKER).read_text()) < 40
    resumed, _, _ = run(*flags, train_iters=40)
    assert_equal(whole, resumed)
    assert losses(tmp_path / "whole") == losses(cut)


def test_read_checkpoint_of_an_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint: latest_checkpointed_iteration.txt is missing"):
        read_checkpoint(tmp_path)


def test_a_release_gives_its_weights(copied):
    (copied / "iter_0000004").rename(copied / "release")
    (copied / storage.TRACKER).write_text("release")
    _, _, state = run("--load", copied, train_iters=1, frozen=("embedding",))
    assert state.iteration == 1
