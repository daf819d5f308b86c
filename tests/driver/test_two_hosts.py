"""Hosts, played by network namespaces with wires to one switch: torchrun on each; one is lost, both start again."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy
import pytest

from tests.helpers import tiny_training as tiny
from tests.helpers.tiny_training import whole_run

ROOT = Path(__file__).parents[2]
STEPS = 40
ADDRESSES = {"mm-host-a": "10.213.7.1", "mm-host-b": "10.213.7.2", "mm-host-c": "10.213.7.3"}
SWITCH = "mm-switch"
TIMEOUT_MINUTES = 0.15


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Three namespaces, each with a wire to the switch."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need iproute2 and root")
    try:
        ip("netns", "add", SWITCH)
        ip("-n", SWITCH, "link", "add", "bridge", "type", "bridge")
        ip("-n", SWITCH, "link", "set", "bridge", "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine makes no network namespaces: {error.stderr.decode().strip()}")
    try:
        for host, address in ADDRESSES.items():
            ip("netns", "add", host)
            ip("link", "add", "mm0", "netns", host, "type", "veth", "peer", "name", host, "netns", SWITCH)
            ip("-n", SWITCH, "link", "set", host, "master", "bridge", "up")
            ip("-n", host, "address", "add", f"{address}/24", "dev", "mm0")
            ip("-n", host, "link", "set", "mm0", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield list(ADDRESSES)
    finally:
        for host in (*ADDRESSES, SWITCH):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", host)


TRAIN = "tests.helpers.tiny_training"


def start(host, program, log, place=None):
    """A Python module on one host, under the host's own name."""
    name = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host]
    process = subprocess.Popen(
        ["ip", "netns", "exec", host, *name, sys.executable, "-m", *program],
        cwd=ROOT,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "mm0", "OMP_NUM_THREADS": "1"} | (place or {}),
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    process.host, process.log = host, log
    return process


def torchrun(number, save):
    """The command on one of two hosts with two ranks each."""
    return [
        *("torch.distributed.run", "--nnodes", "2", "--node_rank", str(number), "--nproc_per_node", "2"),
        *("--master_addr", ADDRESSES["mm-host-a"], "--master_port", "29713"),
        *("-m", TRAIN, "0.05", str(STEPS), "--save", str(save), "--load", str(save)),
        *("--save-interval", "5", "--distributed-timeout-minutes", str(TIMEOUT_MINUTES)),
    ]


def power_off(process):
    """Kill everything that runs on a host."""
    found = subprocess.run(["ip", "netns", "pids", process.host], capture_output=True, text=True).stdout.split()
    for number in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(number), signal.SIGKILL)
    process.wait()


def start_both(hosts, save, folder, attempt):
    return [
        start(host, torchrun(number, save), folder / f"{host}.{attempt}.log") for number, host in enumerate(hosts[:2])
    ]


def wait_until(done, running, seconds=120):
    """Wait until `done()`, or fail with what the runs have said."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            pytest.fail("\n\n".join(process.log.read_text()[-3000:] for process in running))
        time.sleep(0.05)


def says(process, text):
    return text in process.log.read_text()


def check_resumes(hosts, save, folder):
    """Both hosts start again and come to the end, as a run in one process does."""
    running = start_both(hosts, save, folder, 2)
    try:
        assert [process.wait(120) for process in running] == [0, 0], running[0].log.read_text()[-3000:]
    finally:
        for process in running:
            power_off(process)
    whole_run("--save", folder / "whole", train_iters=STEPS, batch=(4, 8))
    found, wanted = ([r["loss"] for r in tiny.records(place)] for place in (save, folder / "whole"))
    numpy.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("single_process")
def test_a_host_is_lost_and_the_run_resumes(hosts, tmp_path):
    save = tmp_path / "save"
    running = start_both(hosts, save, tmp_path, 1)
    try:
        wait_until((save / "iter_0000005").exists, running)
        power_off(running[1])
        assert running[0].wait(60) != 0
        said = running[0].log.read_text()
        assert "on 2 host(s), backend gloo" in said
        assert "on mm-host-b is lost" in said, said[-3000:]
    finally:
        for process in running:
            power_off(process)
    check_resumes(hosts, save, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("single_process")
def test_a_wire_is_cut_and_the_run_resumes(hosts, tmp_path):
    """Nobody's connection is closed: both sides notice the silence."""
    save = tmp_path / "save"
    running = start_both(hosts, save, tmp_path, 1)
    try:
        wait_until((save / "iter_0000005").exists, running)
        ip("-n", SWITCH, "link", "set", "mm-host-b", "down")
        first, second = running
        for process, news in (
            (first, "on mm-host-b is lost, it gave no sign of life"),
            (second, "rank 0's host is lost or cannot be reached, 10.213.7.1:29713"),
        ):
            wait_until(partial(says, process, news), running)
            wait_until(partial(says, process, "This rank stops; start again"), running)
    finally:
        for process in running:
            power_off(process)
    ip("-n", SWITCH, "link", "set", "mm-host-b", "up")
    check_resumes(hosts, save, tmp_path)


@pytest.mark.slow
def test_hosts_that_cannot_reach_each_other_are_named(hosts, tmp_path):
    """All reach the first host; between the second and the third, packets get lost."""
    nowhere = ["lladdr", "02:00:00:00:00:99", "nud", "permanent", "dev", "mm0"]
    ip("-n", "mm-host-b", "neighbour", "replace", ADDRESSES["mm-host-c"], *nowhere)
    ip("-n", "mm-host-c", "neighbour", "replace", ADDRESSES["mm-host-b"], *nowhere)
    running = []
    for rank, host in enumerate(hosts):
        limit = ["--preflight-timeout-seconds", "20"]
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3, "MASTER_ADDR": "10.213.7.1", "MASTER_PORT": 29714}
        program = [TRAIN, "0.05", "5", *limit]
        text = {name: str(value) for name, value in place.items()}
        running.append(start(host, program, tmp_path / f"{host}.log", text))
    try:
        for process in running:
            assert process.wait(90) != 0
            said = process.log.read_text()
            assert "the first collectives did not end within 20 s. Out of reach: " in said
            assert "mm-host-b (rank 1) -> rank 2 on mm-host-c (10.213.7.3: timed out)" in said, said[-3000:]
            assert "mm-host-c (rank 2) -> rank 1 on mm-host-b (10.213.7.2: timed out)" in said
    finally:
        for process in running:
            power_off(process)
