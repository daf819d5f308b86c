"""One process: saving, resuming, beginning from other weights."""

import errno
import itertools
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.platform import get_platform
from tests.helpers import tiny_training as tiny
from tests.helpers.tiny_training import whole_run as run

get_platform("cpu")

from megatron.driver.checkpoint import checkpointing, locks, saver, storage  # noqa: E402
from megatron.driver.checkpoint.reading import read_checkpoint  # noqa: E402
from megatron.driver.state import Hooks  # noqa: E402

pytestmark = pytest.mark.usefixtures("single_process")

PRECISIONS = [[], ["--bf16"], ["--fp16", "--initial-loss-scale", "1024"]]


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
    assert sorted(os.listdir(tmp_path)) == [".lock", "iter_0000002", "iter_0000004", storage.TRACKER, "metrics.jsonl"]


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    run("--save", tmp_path, "--exit-interval", "2")

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpointing, "write_tensors", full)
        with pytest.raises(CheckpointError, match="iteration 4 could not be saved .*No space left.*before are whole"):
            run("--save", tmp_path, "--load", tmp_path)
    assert read_checkpoint(tmp_path).run["iteration"] == 2


def test_a_full_disk_need_not_stop_the_run(tmp_path, monkeypatch, caplog):
    original, calls = checkpointing.write_tensors, []

    def full_once(*args):
        calls.append(None)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        original(*args)

    monkeypatch.setattr(checkpointing, "write_tensors", full_once)
    _, report, _ = run("--save", tmp_path, "--save-interval", "2", "--on-save-error", "continue", train_iters=6)
    assert report.checkpoint.name == "iter_0000006"
    assert "No space left on device" in caplog.text and "Training goes on" in caplog.text
    assert storage.iterations(tmp_path) == [2, 6]
    assert not list(tmp_path.glob(".*.saving"))


def test_old_checkpoints_are_deleted(tmp_path):
    run("--save", tmp_path, "--save-interval", "1", "--keep-last", "2", "--keep-every", "4", train_iters=11)
    assert storage.iterations(tmp_path) == [4, 8, 10, 11]
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == [f"iter_{n:07d}" for n in (4, 8, 10, 11)]


def test_a_deletion_that_was_killed_is_finished(tmp_path, monkeypatch):
    run("--save", tmp_path, "--save-interval", "2")
    with monkeypatch.context() as patched, pytest.raises(Killed):

        def kill(path):
            raise Killed

        patched.setattr(storage.shutil, "rmtree", kill)
        storage.prune(tmp_path, 1, None)
    assert storage.iterations(tmp_path) == [4]
    run("--save", tmp_path, "--load", tmp_path, train_iters=5)
    assert not list(tmp_path.glob(".iter*"))


def test_saving_by_the_clock(tmp_path, monkeypatch):
    """The clock cannot be set: a jump of the calendar changes nothing."""
    now = [0.0]
    monkeypatch.setattr(saver.time, "monotonic", lambda: now[0])

    def step(data_iterator, model):
        now[0] += 30.0  # a minute a step of two micro-batches
        return tiny.forward_step(data_iterator, model)

    run("--save", tmp_path, "--save-interval-minutes", "3", train_iters=8, step=step)
    assert storage.iterations(tmp_path) == [3, 6, 8]


def test_two_runs_in_one_folder(tmp_path):
    """Another process holds the lock, and loses it with its life."""
    hold = (
        "import sys; from pathlib import Path; from megatron.driver.checkpoint import locks; "
        "locks.acquire(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(
            CheckpointError, match=f'is in use by another run .*"process": {process.pid}.*stop that run'
        ):
            run("--save", tmp_path)
    finally:
        process.kill()
        process.communicate()
    _, report, _ = run("--save", tmp_path)
    assert report.iteration == 4


def test_a_host_that_died_keeps_no_lock(tmp_path, caplog):
    """What the file says about another host's process is no lock."""
    (tmp_path / ".lock").write_text('{"host": "host-that-burnt-down", "process": 1}')
    _, report, _ = run("--save", tmp_path)
    assert report.iteration == 4
    assert socket.gethostname() in (tmp_path / ".lock").read_text()


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def refuse(*_args):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    _, report, _ = run("--save", tmp_path)
    assert report.iteration == 4
    assert "knows no locks" in caplog.text and "that no second run writes there" in caplog.text


def test_the_calendar_may_jump(tmp_path, monkeypatch):
    """Hours back and forth between the steps: nothing is waited for, saved, deleted or lost because of it."""
    jumps = itertools.cycle([0.0, -1e5, 3e7])
    monkeypatch.setattr(time, "time", lambda: 1.8e9 + next(jumps))
    flags = ["--save", tmp_path, "--save-interval-minutes", "60", "--save-interval", "2", "--keep-last", "2"]
    whole, _, _ = run(*flags, train_iters=9)
    assert storage.iterations(tmp_path) == [8, 9]
    resumed, _, _ = run(*flags, "--load", tmp_path, "--ckpt-step", "8", train_iters=9)
    assert_equal(whole, resumed)
    assert all(record["seconds"] > 0 for record in tiny.records(tmp_path))


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
    assert sorted(os.listdir(tmp_path)) == [".lock", "iter_0000004", storage.TRACKER, "metrics.jsonl"]


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


def test_load_of_the_own_empty_folder_starts_from_scratch(tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, report, _ = run("--save", tmp_path / "own", "--load", "own", train_iters=1)
    assert report.iteration == 1
    assert "own holds no checkpoint (latest_checkpointed_iteration.txt is missing): the run begins" in caplog.text
    (tmp_path / "own" / storage.TRACKER).unlink()  # as if it had been killed in its first save
    run("--save", tmp_path / "own", "--load", "own", train_iters=1)
    assert "whole iterations are there (1): write 1 into that file to go on from the last one" in caplog.text


def test_a_fresh_run_into_a_used_folder_warns(tmp_path, caplog):
    run("--save", tmp_path)
    run("--save", tmp_path)
    assert "this run begins at step 0 with the model config's weights and replaces" in caplog.text
    assert [record["iteration"] for record in tiny.records(tmp_path)] == [1, 2, 3, 4]


def test_save_must_be_writable_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="--save .*file/save cannot be written to"):
        run("--save", tmp_path / "file" / "save")


def test_damaged_metrics_are_cut(tmp_path, caplog):
    run("--save", tmp_path, "--save-interval", "2")
    file = tmp_path / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]) + "\0\0{\n" + lines[3])
    run("--save", tmp_path, "--load", tmp_path, "--ckpt-step", "2")
    assert [record["iteration"] for record in tiny.records(tmp_path)] == [1, 2, 3, 4]
    assert "the records after iteration 2 are damaged and dropped" in caplog.text


@pytest.mark.slow
def test_killed_by_the_system_and_resumed(tmp_path):
    """kill -9 of a process of its own, wherever it happens to be; test_lost_ranks does so with two."""
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
