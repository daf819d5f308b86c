"""kill -9 at random moments: the others stop and say who is lost, the next start goes on from a whole checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from tests.driver.test_driver_ranks import full
from tests.helpers import tiny_training as tiny
from tests.helpers.killed_runs import PATIENCE_MINUTES
from tests.helpers.tiny_training import whole_run

ROOT = Path(__file__).parents[2]


def killed_runs(save, kills, seed, steps):
    """The JSON lines of tests.helpers.killed_runs."""
    command = [sys.executable, "-m", "tests.helpers.killed_runs", str(save), str(kills), str(seed), str(steps)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60 + 20 * kills)
    assert found.returncode == 0, found.stderr[-2000:]
    return [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]


def check(tmp_path, kills, seed, steps):
    save, whole = tmp_path / "cut", tmp_path / "whole"
    starts = killed_runs(save, kills, seed, steps)
    assert starts[-1]["ends"] == [0, 0], starts[-1]["said"]
    reached = 0
    for start in starts:
        assert start["iteration"] >= reached, "a checkpoint was lost"
        reached = start["iteration"]
        if len(start["victims"]) == 1 and start["ends"][1 - start["victims"][0]] != 0:
            (victim,) = start["victims"]
            said = start["said"][1 - victim]
            assert f"rank {victim}" in said or f"rank(s) {victim} of 2 did not start" in said, said
            assert start["seconds"] < 60 * PATIENCE_MINUTES * 2 + 25
    assert reached == steps
    whole_run("--save", whole, "--save-interval", "50", train_iters=steps)
    keys = ("iteration", "loss", "grad_norm", "consumed_samples")
    found, wanted = ([[r[key] for key in keys] for r in tiny.records(folder)] for folder in (save, whole))
    numpy.testing.assert_allclose(found, wanted, rtol=1e-5)
    tensors = full(save)
    for name, value in full(whole).items():
        numpy.testing.assert_allclose(tensors[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.usefixtures("single_process")
def test_five_kills(tmp_path):
    check(tmp_path, kills=5, seed=1, steps=40)


@pytest.mark.slow
@pytest.mark.usefixtures("single_process")
def test_fifty_kills(tmp_path):
    check(tmp_path, kills=50, seed=2, steps=800)
