"""The launcher, torchrun and two ranks that train: signals that are sent from outside save the run before it stops."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.golden_training import records
from tests.helpers.killed_runs import free_port
from tests.parallel.test_command import describe_data, folder  # noqa: F401  a fixture

ROOT = Path(__file__).parents[2]
STEPS = 400


def launch(place, *flags):
    """Two ranks of `examples/llava1.5/pretrain_llava1_5.sh`."""
    variables = {"NPUS_PER_NODE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "MBS": "1"}
    variables |= {"PRECISION": "fp32", "MM_MODEL": f"{place}/model.json", "MM_DATA": f"{place}/data.json"}
    variables |= {"SAVE_PATH": f"{place}/save", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = ["bash", "examples/llava1.5/pretrain_llava1_5.sh"]
    own = [
        "--train-iters",
        str(STEPS),
        "--vocab-size",
        "1000",
        "--num-workers",
        "0",
        "--device",
        "cpu",
        "--seq-length",
        "192",
        "--log-format",
        "megatron",
        *flags,
    ]
    return subprocess.Popen(
        [*script, *own],
        cwd=ROOT,
        env=os.environ | variables | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "sent", ["TERM to the launcher", "HUP to the launcher", "USR1 to every process", "KILL to the launcher"]
)
def test_a_signal_saves_the_run(golden, folder, sent):  # noqa: F811
    describe_data(golden, folder)
    with launch(folder) as first:
        said = []
        for line in first.stdout:
            said.append(line)
            if " iteration        3/" in line:
                break
        if sent.startswith(("TERM", "HUP")):
            first.send_signal(signal.Signals[f"SIG{sent.split()[0]}"])
        elif sent.startswith("KILL"):  # the ranks are told, and go on until they have saved
            first.kill()
        else:  # as Slurm does before the time limit
            ranks = subprocess.check_output(["ps", "--ppid", str(first.pid), "-o", "pid="], text=True).split()
            assert len(ranks) == 2
            for process in (first.pid, *map(int, ranks)):
                os.kill(process, signal.SIGUSR1)
        said = "".join([*said, first.stdout.read()])
    assert (folder / "save" / "metrics.jsonl").exists(), said
    trained = records(folder / "save")[-1]["iteration"]
    assert 3 <= trained < STEPS, said
    assert int((folder / "save" / "latest_checkpointed_iteration.txt").read_text()) == trained, said
    with launch(folder, "--train-iters", str(trained + 3)) as second:
        more = second.stdout.read()
    assert second.returncode == 0, more
    assert [record["iteration"] for record in records(folder / "save")] == list(range(1, trained + 4)), more
