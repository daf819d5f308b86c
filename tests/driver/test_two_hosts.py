"""Two hosts, played by network namespaces with a wire between them: torchrun on each; one is lost, both start again."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest

from tests.helpers import tiny_training as tiny
from tests.helpers.tiny_training import whole_run

ROOT = Path(__file__).parents[2]
STEPS = 40
ADDRESSES = {"mm-host-a": "10.213.7.1", "mm-host-b": "10.213.7.2"}


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Two namespaces with one wire."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need iproute2 and root")
    first, second = ADDRESSES
    try:
        ip("netns", "add", first)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine makes no network namespaces: {error.stderr.decode().strip()}")
    try:
        ip("netns", "add", second)
        ip("link", "add", "mm0", "netns", first, "type", "veth", "peer", "name", "mm0", "netns", second)
        for host, address in ADDRESSES.items():
            ip("-n", host, "address", "add", f"{address}/24", "dev", "mm0")
            ip("-n", host, "link", "set", "mm0", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield list(ADDRESSES)
    finally:
        for host in ADDRESSES:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", host)


def start(host, number, save, log):
    """torchrun with two ranks on one host, under the host's own name."""
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(number)),
        *("--nproc_per_node", "2", "--master_addr", ADDRESSES["mm-host-a"], "--master_port", "29713"),
        *("-m", "tests.helpers.tiny_training", "0.05", str(STEPS), "--save", str(save), "--load", str(save)),
        *("--save-interval", "5", "--distributed-timeout-minutes", "0.1"),
    ]
    name = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host]
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *name, *torchrun],
        cwd=ROOT,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "mm0", "OMP_NUM_THREADS": "1"},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def power_off(process):
    """Kill everything that runs on a host."""
    found = subprocess.run(["ip", "netns", "pids", process.host], capture_output=True, text=True).stdout.split()
    for number in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(number), signal.SIGKILL)
    process.wait()


def start_both(hosts, save, folder, attempt):
    running = []
    for number, host in enumerate(hosts):
        log = folder / f"{host}.{attempt}.log"
        process = start(host, number, save, log)
        process.host, process.log = host, log
        running.append(process)
    return running


@pytest.mark.slow
@pytest.mark.usefixtures("single_process")
def test_a_host_is_lost_and_the_run_resumes(hosts, tmp_path):
    save = tmp_path / "save"
    running = start_both(hosts, save, tmp_path, 1)
    try:
        end = time.monotonic() + 120
        while not (save / "iter_0000005").exists():
            assert time.monotonic() < end and running[0].poll() is None, running[0].log.read_text()[-3000:]
            time.sleep(0.05)
        power_off(running[1])
        assert running[0].wait(60) != 0
        said = running[0].log.read_text()
        assert "on 2 host(s), backend gloo" in said
        assert "on mm-host-b is lost" in said, said[-3000:]
        running = start_both(hosts, save, tmp_path, 2)
        assert [process.wait(120) for process in running] == [0, 0], running[0].log.read_text()[-3000:]
    finally:
        for process in running:
            power_off(process)
    whole_run("--save", tmp_path / "whole", train_iters=STEPS, batch=(4, 8))
    found, wanted = ([r["loss"] for r in tiny.records(folder)] for folder in (save, tmp_path / "whole"))
    numpy.testing.assert_allclose(found, wanted, rtol=1e-5)
