"""Saving in the background, and disks that are full: at once and in the background."""

import os
import re
import resource
import signal
import threading

import pytest
import torch

from mindspeed_mm.errors import CheckpointError, TrainingError
from mindspeed_mm.platform import get_platform
from tests.driver.test_driver_ranks import LAYOUTS, full, trained
from tests.driver.test_driver_resume import assert_equal, losses
from tests.helpers import tiny_training as tiny
from tests.helpers.tiny_training import whole_run as run
from tests.parallel.comparison import names

get_platform("cpu")

from megatron.driver import metrics  # noqa: E402
from megatron.driver.boards import TensorBoard  # noqa: E402
from megatron.driver.checkpoint import checkpointing, saver, storage  # noqa: E402
from megatron.driver.checkpoint.reading import first_line, read_checkpoint  # noqa: E402
from megatron.driver.metrics import append_line  # noqa: E402
from megatron.driver.state import Hooks  # noqa: E402

pytestmark = pytest.mark.usefixtures("single_process")

LONG = 60
"""Seconds after which a test that waits for the other thread has failed."""


@pytest.fixture
def slow_disk(monkeypatch):
    """Writing begins when the event is set; it is left set, for a test to clear it."""
    begin = threading.Event()
    begin.set()
    original = saver.write_snapshot

    def write_snapshot(*args):
        assert begin.wait(LONG), "training did not go on while the save was under way"
        return original(*args)

    monkeypatch.setattr(saver, "write_snapshot", write_snapshot)
    return begin


def tensors(path):
    """Every file of a checkpoint that holds tensors, model or optimizer, as bytes."""
    return {file.name: file.read_bytes() for file in path.iterdir() if file.suffix in (".distcp", ".safetensors")}


@pytest.mark.parametrize("flags", [[], ["--bf16", "--use-distributed-optimizer"]], ids=["fp32", "distributed"])
def test_what_is_written_later_is_the_state_of_then(tmp_path, slow_disk, flags):
    """Iteration 2 is written after step 4 has changed the model."""
    at_once, later = tmp_path / "at_once", tmp_path / "later"
    common = [*flags, "--save-interval", "2"]
    whole, _, _ = run(*common, "--save", at_once, train_iters=7, dropout=0.1, frozen=("embedding",))
    steps = []

    def after_step(state):
        steps.append(state.iteration)
        if state.iteration == 2:
            slow_disk.clear()
        if state.iteration == 4:
            assert storage.iterations(later) == []
            slow_disk.set()

    hooks = Hooks(after_step=after_step)
    flags = [*common, "--save", later, "--async-save"]
    run(*flags, train_iters=7, dropout=0.1, frozen=("embedding",), hooks=hooks)
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert storage.iterations(later) == storage.iterations(at_once) == [2, 4, 6, 7]
    for number in (2, 4, 6, 7):
        assert tensors(later / f"iter_{number:07d}") == tensors(at_once / f"iter_{number:07d}"), number
    resumed, _, _ = run(*flags, "--load", later, "--ckpt-step", "2", train_iters=7, dropout=0.1, frozen=("embedding",))
    assert_equal(whole, resumed)
    assert losses(later) == losses(at_once)


@pytest.mark.parametrize("name", names(["dp2-distributed-overlap", "tp2", "pp2"], slow=("tp2", "pp2")))
def test_several_ranks_save_in_the_background(ranks, tmp_path, name):
    flags, world_size, batch = LAYOUTS[name]
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    first = ranks(world_size).run(trained, [*flags, "--save", whole], world_size, 6, batch)
    begin = [*flags, "--async-save", "--save-interval", "1", "--keep-last", "2", "--save", cut]
    ranks(world_size).run(trained, [*begin, "--exit-interval", "3"], world_size, 6, batch)
    second = ranks(world_size).run(trained, [*begin, "--load", cut], world_size, 6, batch)
    assert storage.iterations(tmp_path / "cut") == [5, 6]
    assert first[0][0] == second[0][0]
    one, other = full(whole), full(cut)
    for key, value in one.items():
        assert (value == other[key]).all(), key


def test_the_next_save_waits_for_the_one_before(tmp_path, slow_disk, caplog):
    def after_step(state):
        if state.iteration == 1:
            slow_disk.clear()
            threading.Timer(0.2, slow_disk.set).start()

    with caplog.at_level("INFO", logger="megatron.driver"):
        run("--save", tmp_path, "--async-save", "--save-interval", "1", hooks=Hooks(after_step=after_step))
    order = [record.getMessage() for record in caplog.records if "sav" in record.getMessage()]
    assert [line.startswith("saving iteration") for line in order] == [True, False] * 4, order
    assert "in the background; training waited" in order[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_waits_for_the_save(tmp_path, slow_disk, number):
    def after_step(state):
        slow_disk.clear()
        threading.Timer(0.2, slow_disk.set).start()
        os.kill(os.getpid(), number)  # during the step that follows, for the driver

    _, report, _ = run("--save", tmp_path, "--async-save", hooks=Hooks(after_step=after_step))
    assert report.iteration == 2
    assert report.checkpoint == tmp_path / "iter_0000002"
    assert read_checkpoint(tmp_path).run["iteration"] == 2


def test_an_error_in_training_lets_the_save_end(tmp_path, slow_disk):
    def step(data_iterator, model):
        output, loss_func = tiny.forward_step(data_iterator, model)
        if storage.iterations(tmp_path) or not slow_disk.is_set():
            threading.Timer(0.2, slow_disk.set).start()
            output = output * float("nan")
        return output, loss_func

    hooks = Hooks(after_step=lambda state: slow_disk.clear())
    with pytest.raises(TrainingError, match="step 2: the loss is nan"):
        run("--save", tmp_path, "--async-save", "--save-interval", "1", step=step, hooks=hooks)
    assert read_checkpoint(tmp_path).run["iteration"] == 1


def test_letter_k_ctrl_c_twice_does_not_wait_for_the_save(tmp_path, slow_disk):
    def step(data_iterator, model):
        if not slow_disk.is_set():
            raise KeyboardInterrupt
        return tiny.forward_step(data_iterator, model)

    hooks = Hooks(after_step=lambda state: slow_disk.clear())
    with pytest.raises(KeyboardInterrupt):
        run("--save", tmp_path, "--async-save", "--save-interval", "1", step=step, hooks=hooks)
    assert not slow_disk.is_set() and not storage.iterations(tmp_path)
    slow_disk.set()


def test_both_errors_are_told(tmp_path, monkeypatch, caplog):
    def full_disk(*_args):
        raise OSError(28, "No space left on device")

    def step(data_iterator, model):
        output, loss_func = tiny.forward_step(data_iterator, model)
        return output * (float("nan") if saved else 1.0), loss_func

    saved = []
    original = saver.Saver.save
    monkeypatch.setattr(saver.Saver, "save", lambda self: (original(self), saved.append(1)))
    monkeypatch.setattr(checkpointing, "write_tensors", full_disk)
    with pytest.raises(TrainingError, match="the loss is nan"):
        run("--save", tmp_path, "--async-save", "--save-interval", "1", step=step)
    assert "iteration 1 could not be saved" in caplog.text


class SmallDisk:
    """From the save of iteration 2 to that of 6 the kernel refuses files above some bytes, on one rank or on all."""

    def __init__(self, size, rank=None):
        self.size, self.rank, self.before = size, rank, resource.getrlimit(resource.RLIMIT_FSIZE)

    def __enter__(self):
        self._snapshot = saver.take_snapshot
        saver.take_snapshot = self._take_snapshot  # the save before has ended by then
        return self

    def __exit__(self, *_error):
        saver.take_snapshot = self._snapshot
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)

    def _take_snapshot(self, state, *args, **kwargs):
        if self.rank in (None, torch.distributed.get_rank()):
            limit = self.size if 2 <= state.iteration < 6 else self.before[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, self.before[1]))
        return self._snapshot(state, *args, **kwargs)


@pytest.mark.parametrize("mode", [[], ["--async-save"]], ids=["at once", "background"])
def test_a_full_disk_need_not_stop_the_run(tmp_path, mode, caplog):
    flags = ["--save", tmp_path, "--save-interval", "1", "--on-save-error", "continue", *mode]
    with SmallDisk(20_000):
        _, report, _ = run(*flags, train_iters=7)
    assert report.checkpoint.name == "iter_0000007"
    assert "iteration 2 could not be saved" in caplog.text and "Training goes on" in caplog.text
    assert storage.iterations(tmp_path) == [1, 6, 7]
    for number in (1, 6, 7):
        read_checkpoint(tmp_path, number)
    assert not list(tmp_path.glob(".*.saving"))


@pytest.mark.parametrize("mode", [[], ["--async-save"]], ids=["at once", "background"])
def test_a_full_disk_stops_the_run(tmp_path, mode):
    message = "iteration 2 could not be saved .*File too large.* GB are free there.*before are whole"
    with SmallDisk(20_000), pytest.raises(CheckpointError, match=message):
        run("--save", tmp_path, "--save-interval", "1", *mode, train_iters=50)
    assert not list(tmp_path.glob(".*.saving"))
    assert read_checkpoint(tmp_path).run["iteration"] == 1
    whole, _, _ = run(train_iters=6)
    resumed, _, _ = run("--save", tmp_path, "--load", tmp_path, train_iters=6)
    assert_equal(whole, resumed)


def test_letter_j_a_run_whose_last_save_fails_has_failed(tmp_path, monkeypatch):
    """Whatever --on-save-error says: there is no training left to go on with."""

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpointing, "write_tensors", full)
    with pytest.raises(CheckpointError, match="iteration 6 could not be saved .*No space left"):
        run("--save", tmp_path, "--save-interval", "2", "--on-save-error", "continue", train_iters=6)


@pytest.mark.parametrize("policy", ["stop", "continue"])
@pytest.mark.parametrize(
    ("owner", "name", "place"), [(metrics, "append_line", "metrics.jsonl"), (TensorBoard, "add", "board")]
)
def test_letter_j_a_full_disk_under_the_records_of_steps(tmp_path, monkeypatch, caplog, policy, owner, name, place):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(owner, name, full)
    flags = ["--save", tmp_path, "--tensorboard-dir", tmp_path / "board"]
    message = f"{place} cannot be written: .*No space left.*records of steps are lost"
    if policy == "stop":
        with pytest.raises(CheckpointError, match=message):
            run(*flags, train_iters=2)
    else:
        run(*flags, "--on-save-error", policy, train_iters=2)
        assert len(re.findall(message, caplog.text)) == 1


def test_a_record_is_written_whole_or_not_at_all(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (tmp_path / "file").open("ab", buffering=0) as file:
        append_line(file, b"12345\n")
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
        try:
            with pytest.raises(OSError, match="No space left"):
                append_line(file, b"67890\n")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        append_line(file, b"abcde\n")
    assert (tmp_path / "file").read_bytes() == b"12345\nabcde\n"


def full_on_rank_1(save, mode):
    """Train on this rank; the error's text."""
    flags = ["--save", save, "--save-interval", "1", "--tensor-model-parallel-size", "2", *mode]
    args = tiny.arguments(*flags, world_size=2, train_iters=50)
    try:
        with SmallDisk(2_000, rank=1):
            tiny.run(args)
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize("mode", [[], ["--async-save"]], ids=["at once", "background"])
def test_a_disk_that_is_full_on_one_host(ranks, tmp_path, mode):
    said = ranks(2).run(full_on_rank_1, str(tmp_path), mode)
    assert all("iteration 2 could not be saved" in text for text in said), said
    assert read_checkpoint(tmp_path).run["iteration"] == 1


def test_torchs_word_for_a_torn_write_is_explained():
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    assert "could not write a file to its end: a full disk" in first_line(error)
    assert "full disk" not in first_line(RuntimeError("another"))
