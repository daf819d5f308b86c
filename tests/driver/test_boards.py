"""Letter Q: W&B and SwanLab beside TensorBoard, with stand-ins for the libraries, and with them where installed."""

import importlib.machinery
import importlib.util
import json
import sys
import types

import pytest

from mindspeed_mm.errors import ConfigError, TrainingError
from mindspeed_mm.platform import get_platform
from tests.helpers import tiny_training as tiny

get_platform("cpu")

from megatron.driver.boards import check_boards  # noqa: E402


class WandbError(Exception):
    """As wandb.Error."""


def library(monkeypatch, name, **content):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """What a stand-in for wandb was asked to do."""
    asked = {"logged": [], "finished": []}

    def init(**options):
        if "refused" in asked:
            raise WandbError(asked["refused"])
        asked["init"] = options
        return types.SimpleNamespace(
            dir=str(tmp_path / "offline-run" / "files"),
            log=lambda values, step: asked["logged"].append((step, values)),
            finish=lambda exit_code: asked["finished"].append(exit_code),
        )

    library(monkeypatch, "wandb", init=init, Settings=dict, Error=WandbError)
    return asked


@pytest.fixture
def swanlab(monkeypatch):
    """What a stand-in for swanlab was asked to do."""
    asked = {"logged": [], "finished": []}

    def init(**options):
        if "refused" in asked:
            raise RuntimeError(asked["refused"])
        asked["init"] = options

    library(
        monkeypatch,
        "swanlab",
        init=init,
        log=lambda values, step: asked["logged"].append((step, values)),
        finish=lambda state="success", error=None: asked["finished"].append((state, error)),
    )
    return asked


def test_letter_q_wandb_gets_the_figures_of_every_step(wandb, tmp_path, caplog):
    with caplog.at_level("INFO", logger="megatron.driver"):
        tiny.whole_run("--wandb-project", "toy", "--save", tmp_path / "run", "--log-interval", "2", train_iters=3)
    asked = wandb["init"]
    assert (asked["project"], asked["name"], asked["group"]) == ("toy", "run", "run")
    assert (asked["mode"], asked["dir"]) == ("offline", str(tmp_path / "run"))
    assert asked["config"]["train_iters"] == 3 and json.dumps(asked["config"])
    assert asked["settings"] == {"console": "off", "silent": True}
    assert [step for step, _ in wandb["logged"]] == [1, 2, 3] and wandb["finished"] == [0]
    assert f"to be sent with: wandb sync {tmp_path / 'offline-run'}" in caplog.text


def test_every_board_gets_what_tensorboard_gets(wandb, swanlab, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "board"
    flags = ["--tensorboard-dir", folder, "--wandb-project", "a", "--swanlab-project", "b", "--save", tmp_path / "run"]
    tiny.whole_run(*flags, train_iters=2)
    events = EventAccumulator(str(folder)).Reload()
    names = set(events.Tags()["scalars"])
    assert {"loss", "grad_norm", "samples/s"} <= names
    assert wandb["logged"] == swanlab["logged"]
    for step, values in wandb["logged"]:
        assert set(values) == names
        assert values["loss"] == pytest.approx(events.Scalars("loss")[step - 1].value)


def test_swanlab_is_offline_unless_asked(swanlab, tmp_path, caplog):
    flags = ["--swanlab-project", "toy", "--swanlab-exp-name", "first", "--swanlab-save-dir", tmp_path / "own"]
    with caplog.at_level("INFO", logger="megatron.driver"):
        tiny.whole_run(*flags, train_iters=1)
    asked = swanlab["init"]
    assert (asked["project"], asked["name"], asked["mode"]) == ("toy", "first", "offline")
    assert asked["log_dir"] == str(tmp_path / "own") and (tmp_path / "own").is_dir()
    assert swanlab["finished"] == [("success", None)]
    assert f"to be sent with: swanlab sync {tmp_path / 'own'}/run-*" in caplog.text
    tiny.whole_run(*flags, "--online", train_iters=1)
    assert swanlab["init"]["mode"] == "online" and "SwanLab sends the curves while the run trains" in caplog.text


def test_wandb_online(wandb, tmp_path):
    tiny.whole_run("--wandb-project", "a", "--wandb-save-dir", tmp_path / "w", "--online", train_iters=1)
    assert (wandb["init"]["mode"], wandb["init"]["name"]) == ("online", "w")


def test_a_failed_run_is_marked_as_one(wandb, swanlab, tmp_path):
    def poisoned(data_iterator, model):
        output, loss_func = tiny.forward_step(data_iterator, model)
        return output * float("inf"), loss_func

    with pytest.raises(TrainingError, match="step 1: the loss is"):
        tiny.whole_run("--wandb-project", "a", "--swanlab-project", "b", "--save", tmp_path, step=poisoned)
    assert wandb["finished"] == [1]
    ((state, error),) = swanlab["finished"]
    assert state == "crashed" and error.startswith("TrainingError: step 1: the loss is")


def test_a_resumed_run_goes_on_with_its_steps(wandb, tmp_path):
    flags = ["--wandb-project", "a", "--save", tmp_path, "--load", tmp_path]
    tiny.whole_run(*flags, train_iters=2)
    tiny.whole_run(*flags, train_iters=3)
    assert [step for step, _ in wandb["logged"]] == [1, 2, 3]


def test_a_tracker_that_does_not_begin_is_told(wandb, swanlab, tmp_path):
    wandb["refused"] = swanlab["refused"] = "no login"
    with pytest.raises(
        TrainingError, match=r"W&B does not begin: no login. Log in \(wandb login\), or leave --online out"
    ):
        tiny.whole_run("--wandb-project", "a", "--save", tmp_path)
    with pytest.raises(TrainingError, match="SwanLab does not begin: no login. Log in"):
        tiny.whole_run("--swanlab-project", "a", "--save", tmp_path)


@pytest.mark.parametrize(("name", "called"), [("wandb", "W&B"), ("swanlab", "SwanLab")])
def test_a_library_that_is_not_installed_names_the_extra(monkeypatch, name, called):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda found: None if found == name else find(found))
    args = tiny.arguments(f"--{name}-project", "a", "--save", "x")
    with pytest.raises(ConfigError, match=rf"{called}, which is not installed: pip install 'mindspeed-mm\[{name}\]'"):
        check_boards(args)
    check_boards(tiny.arguments())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--wandb-project", "a"], "--wandb-project needs a folder: give --save or --wandb-save-dir"),
        (["--swanlab-project", "a"], "--swanlab-project needs a folder: give --save or --swanlab-save-dir"),
        (["--wandb-exp-name", "a"], "--wandb-exp-name is given without --wandb-project"),
        (["--swanlab-save-dir", "a"], "--swanlab-save-dir is given without --swanlab-project"),
        (["--online"], "--online is given without --wandb-project or --swanlab-project"),
    ],
)
def test_flags_that_need_others(flags, message):
    with pytest.raises(ConfigError, match=message):
        tiny.arguments(*flags)


@pytest.mark.parametrize(
    ("name", "pattern"), [("wandb", "wandb/offline-run-*/*.wandb"), ("swanlab", "swanlab/run-*/*.swanlab")]
)
def test_the_real_library_writes_offline(tmp_path, monkeypatch, name, pattern):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the extra {name} is not installed")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    tiny.whole_run(f"--{name}-project", "toy", "--save", tmp_path / "run", train_iters=2)
    (written,) = (tmp_path / "run").glob(pattern)
    assert written.stat().st_size > 1000
