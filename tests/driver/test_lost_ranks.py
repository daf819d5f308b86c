"""kill -9 at random moments, ranks that stand still: the others stop and say who is lost, the next start goes on."""

import json
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy
import pytest

from tests.driver.test_driver_ranks import full
from tests.helpers import tiny_training as tiny
from tests.helpers.tiny_training import whole_run
from tests.parallel.test_command import describe_data, folder  # noqa: F401  a fixture

ROOT = Path(__file__).parents[2]


def killed_runs(save, kills, seed, command, **more):
    """The JSON lines of tests.helpers.killed_runs."""
    plan = {"save": str(save), "kills": kills, "seed": seed, "command": command, "moments": [0.3, 1.5]} | more
    program = [sys.executable, "-m", "tests.helpers.killed_runs", json.dumps(plan)]
    found = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    return [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]


def check_starts(starts, steps):
    """Nothing saved is lost, survivors name the victim, the last start comes to the end.

    A start that the machine spoiled was tried again with more time (see killed_runs), which is told; its checkpoints
    count as well.
    """
    reached = 0
    for start in starts:
        assert start["iteration"] >= reached, "a checkpoint was lost"
        reached = start["iteration"]
        if start["spoiled"]:
            warnings.warn(f"busy machine, tried again: {start['problem']}", stacklevel=2)
        else:
            assert not start["problem"], (start["problem"], start["said"])
    assert reached == steps


def check(tmp_path, kills, seed, steps):
    save, whole = tmp_path / "cut", tmp_path / "whole"
    check_starts(killed_runs(save, kills, seed, ["tiny", "0.005", str(steps)]), steps)
    whole_run("--save", whole, "--save-interval", "50", train_iters=steps)
    keys = ("iteration", "loss", "grad_norm", "consumed_samples")
    found, wanted = ([[r[key] for key in keys] for r in tiny.records(place)] for place in (save, whole))
    numpy.testing.assert_allclose(found, wanted, rtol=1e-5)
    tensors = full(save)
    for name, value in full(whole).items():
        numpy.testing.assert_allclose(tensors[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.usefixtures("single_process")
@pytest.mark.slow
def test_three_kills(tmp_path):
    check(tmp_path, kills=3, seed=1, steps=40)


@pytest.mark.slow
@pytest.mark.usefixtures("single_process")
def test_fifty_kills(tmp_path):
    check(tmp_path, kills=50, seed=2, steps=800)


def check_train(golden, place, kills, seed, steps):
    """The command itself with a vision-language model, against the same two ranks left alone: bit for bit."""
    describe_data(golden, place)
    command = ["train", "--mm-model", str(place / "model.json"), "--mm-data", str(place / "data.json")]
    command += f"--lr 1e-3 --train-iters {steps} --micro-batch-size 1 --global-batch-size 2 --device cpu".split()
    command += "--seq-length 192 --num-workers 0 --log-interval 1".split()
    cut, whole = place / "cut", place / "whole"
    starts = killed_runs(cut, kills, seed, command, moments=[0.5, 4.0])
    check_starts(starts, steps)
    check_starts(killed_runs(whole, 0, seed, command), steps)
    keys = ("iteration", "loss", "grad_norm", "consumed_samples")
    found, wanted = ([[r[key] for key in keys] for r in tiny.records(save)] for save in (cut, whole))
    assert found == wanted
    one, other = full(cut), full(whole)
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)


def test_a_kill_of_the_command(golden, folder):  # noqa: F811
    check_train(golden, folder, kills=1, seed=3, steps=20)


@pytest.mark.slow
def test_twenty_kills_of_the_command(golden, folder):  # noqa: F811
    check_train(golden, folder, kills=20, seed=4, steps=300)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_is_stopped_is_lost(tmp_path, victim):
    """SIGSTOP: alive, its connections are open, it does not answer. Rank 0 keeps the store, which is silent then."""
    starts = killed_runs(
        tmp_path / "save",
        *(1, 5, ["tiny", "0.02", "40"]),
        **{"victims": [[victim]], "signal": signal.SIGSTOP, "moments": [0.0, 0.2], "saved": True},
    )
    check_starts(starts, 40)
    first = starts[-2]
    said = first["said"][1 - victim]
    assert first["ends"][1 - victim] > 0, said
    assert ("rank 1 on" if victim else "rank 0's host is lost or cannot be reached, 127.0.0.1:") in said
    patience = min(30, 60 * first["allowed"][0] / 3)
    assert f"for {patience:g} s" in said and "stops; start again to resume" in said
