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


def test_a_wrong_launcher_is_refused(tmp_path):
    found = submitted(tmp_path, "evaluate-all")
    assert found.returncode == 1
    assert "no launcher examples/llava1.5/evaluate-all_llava1_5.sh" in found.stderr


def test_the_script_tells_slurm_what_the_driver_understands():
    text = SCRIPT.read_text()
    assert "--signal USR1@" in text
    assert "--ntasks-per-node 1" in text
