"""The Slurm script, with stand-ins for Slurm's commands."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "slurm" / "llava1_5.sbatch"

STAND_INS = {
    "scontrol": 'echo "host-1"; echo "host-2"',
    # One task a host: what it is given runs twice.
    "srun": 'shift; for SLURM_PROCID in 0 1; do export SLURM_PROCID; "$@"; done',
    "torchrun": 'echo "$@"',
}


def submitted(tmp_path, *words):
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    place = {"SLURM_JOB_NODELIST": "host-[1-2]", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    environment = os.environ | place | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TP": "4"}
    environment.pop("MASTER_ADDR", None)
    return subprocess.run(["bash", SCRIPT, *words], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_host_starts_the_launcher_with_its_number(tmp_path):
    found = submitted(tmp_path, "pretrain", "--train-iters", "7")
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 2
    for number, line in enumerate(lines):
        assert f"--nnodes 2 --node_rank {number} --master_addr host-1 --master_port 20007" in line
        assert "--tensor-model-parallel-size 4" in line
        assert line.endswith("--train-iters 7")


def test_any_launcher_by_its_path(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAIN_ITERS", "7")
    found = submitted(tmp_path, "examples/grounding/rec_llava1_5.sh")
    assert found.stdout.count("--mm-data examples/grounding/data_rec.json") == 2, found.stderr


def test_the_launcher_of_rec_asks_for_its_steps(tmp_path):
    (tmp_path / "torchrun").write_text('#!/usr/bin/env bash\necho "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    place = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    place.pop("TRAIN_ITERS", None)
    script = ["bash", "examples/grounding/rec_llava1_5.sh", "--lr", "4e-5"]
    without = subprocess.run(script, cwd=ROOT, env=place, capture_output=True, text=True)
    assert without.returncode != 0 and "give TRAIN_ITERS, epochs x lines of the data file / 64" in without.stderr
    done = subprocess.run(script, cwd=ROOT, env=place | {"TRAIN_ITERS": "7"}, capture_output=True, text=True)
    assert "--train-iters 7" in done.stdout and "--global-batch-size 64" in done.stdout
    assert done.stdout.strip().endswith("--lr 4e-5")


def test_a_wrong_launcher_is_refused(tmp_path):
    found = submitted(tmp_path, "evaluate-all")
    assert found.returncode == 1
    assert "no launcher examples/llava1.5/evaluate-all_llava1_5.sh" in found.stderr


def test_the_script_tells_slurm_what_the_driver_understands():
    text = SCRIPT.read_text()
    assert "--signal USR1@" in text
    assert "--ntasks-per-node 1" in text
