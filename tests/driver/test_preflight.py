"""The start of a run: who did not come, what the world looks like; and ranks that end with an error of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_mm.errors import ConfigError, LostRankError, TrainingError
from mindspeed_mm.platform import get_platform
from tests.helpers import tiny_training as tiny
from tests.helpers.killed_runs import free_port
from tests.helpers.memory_store import MemoryStore

get_platform("cpu")

from megatron.driver import preflight, watch  # noqa: E402
from megatron.driver.initialize import initialize, shutdown  # noqa: E402
from mindspeed_mm.platform.distributed import meet  # noqa: E402

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture
def world(monkeypatch):
    """The environment of rank 0 of two, the other one never comes."""
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    return place


def test_a_rank_that_does_not_come_is_named(world):
    args = tiny.arguments("--preflight-timeout-seconds", "0.3", world_size=2)
    with pytest.raises(TrainingError, match=r"rank\(s\) 1 of 2 did not start within 0.3 s; hosts that did: "):
        initialize(args, get_platform("cpu"))


def test_nobody_at_the_master_address(world, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    args = tiny.arguments("--preflight-timeout-seconds", "0.5", world_size=2)
    with pytest.raises(TrainingError, match="rank 1 on .* cannot reach rank 0 at 127.0.0.1:.* Check MASTER_ADDR"):
        initialize(args, get_platform("cpu"))


def test_letter_k_ctrl_c_is_heard_while_nobody_listens(world, monkeypatch):
    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("mindspeed_mm.platform.distributed.time.sleep", pressed)
    with pytest.raises(KeyboardInterrupt):
        initialize(tiny.arguments(world_size=2), get_platform("cpu"))


def test_nobody_answers_a_rank_of_another_command(world, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(LostRankError, match="rank 1 on .* cannot reach rank 0 at 127.0.0.1:.* within 0.2 s: .*refused"):
        meet(get_platform("cpu"), seconds=0.2)


def test_half_an_environment(world, monkeypatch):
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(ConfigError, match="RANK is set, but MASTER_PORT is not"):
        initialize(tiny.arguments(world_size=2), get_platform("cpu"))


def test_the_store_goes_away():
    class LostStore:
        def set(self, *_):
            raise RuntimeError("connection reset")

    with pytest.raises(TrainingError, match="rank 0, which keeps the list of ranks, was lost while rank 3"):
        preflight.sign_in(LostStore(), 3, 4, 1.0)


def grid():
    from megatron.driver import preflight
    from mindspeed_mm.platform import get_platform

    args = tiny.arguments("--tensor-model-parallel-size", "2", world_size=2, batch=(4, 4))
    from megatron.driver.initialize import initialize

    initialize(args, get_platform("cpu"))
    lines = []
    preflight.try_collective(args, get_platform("cpu"), lines.append)
    return lines


def test_rank_0_shows_the_world(ranks):
    first, second = ranks(2).run(grid)
    assert second == []
    assert first[0].startswith("2 ranks on 1 host(s), backend gloo on cpu: tensor 2 x pipeline 1 x context 1 x data 1;")
    assert first[0].endswith("GB/s")
    assert first[2].startswith("  rank    1: tensor 1, pipeline 0, context 0, data 0 on ")


def test_a_rank_that_stands_still_is_found(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    store = MemoryStore()
    first, last = watch.Watch(store, 0, 3, 10.0), watch.Watch(store, 2, 3, 10.0)
    for rank in range(3):
        store.set(f"here/{rank}", f"host-{rank}")
    for step in range(6):
        store.set("alive/0", str(step))
        store.set("alive/1", str(step))
        store.set("alive/2", str(min(step, 2)))
        assert first._watch_all() is None or step == 5
        assert last._watch_first() is None or step == 5
        now[0] += 4.0
    assert first._watch_all() == "rank 2 on host-2 is lost, it gave no sign of life for 10 s"
    assert last._watch_first() == first._watch_all()  # rank 0 has told
    store.pop("lost")
    now[0] += 4.0
    store.set("alive/2", "done")
    store.set("failed/1", "DataError: no image")
    assert first._watch_all() == "rank 1 on host-1 stopped: DataError: no image"
    store.pop("lost")
    assert last._watch_first() is None
    now[0] += 20.0
    assert last._watch_first() == "rank 0 on host-0 is lost, it gave no sign of life for 10 s"
    store.set("failed/0", "Interrupt")
    assert last._watch_first() == "rank 0 on host-0 stopped: Interrupt"


def test_a_store_that_does_not_answer(monkeypatch):
    """Its callers wait in it; and a process that was stopped itself blames nobody for that."""
    now = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("MASTER_ADDR", "host-0")
    monkeypatch.setenv("MASTER_PORT", "29500")
    found = watch.Watch(MemoryStore(), 1, 2, 10.0)
    ends = []
    monkeypatch.setattr(watch.os, "_exit", lambda code: (ends.append((now[0], code)), found._done.set()))

    class Ticks:
        def __init__(self, gaps):
            self.gaps = list(gaps)

        def wait(self, _seconds):
            now[0] += self.gaps.pop(0) if self.gaps else 100.0
            return not self.gaps

        def set(self):
            self.gaps = []

    found._done = Ticks([10 / 6] * 4 + [50.0] + [10 / 6] * 5)  # the long gap is its own
    found._judge()
    assert found.lost is None and not ends
    found._answered, start = now[0], now[0]
    found._done = Ticks([10 / 6] * 40)
    found._judge()
    assert found.lost == "rank 0's host is lost or cannot be reached, host-0:29500 gave no answer for 10 s"
    ((end, code),) = ends
    assert code == 70 and end - start < 10.0 * watch.SHARE  # within --distributed-timeout-minutes


def test_a_loss_that_is_seen_late_is_told(monkeypatch):
    """On a busy machine the others are asked long after a collective has failed."""
    now = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    store = MemoryStore()
    found = watch.Watch(store, 0, 2, 10.0)
    store.set("here/1", "host-1")
    store.set("alive/1", "7")
    found._ask_once(1)
    lives = False

    def sleep(_seconds):
        now[0] += 15.0
        if lives:
            store.set("alive/1", str(now[0]))
        if now[0] > 50.0:
            found._ask_once(2)

    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert found.wait_for_news() == "rank 1 on host-1 is lost, it gave no sign of life for 6 s"
    found.lost, lives = None, True
    assert found.wait_for_news() is None
    assert now[0] == 90.0  # both patiences are over


def test_errors_that_are_no_losses_stay_as_they_are():
    with pytest.raises(RuntimeError, match="^a shape$"), watch.naming_lost_ranks():
        raise RuntimeError("a shape")


FAILING = """
import sys
from tests.helpers import tiny_training as tiny
from mindspeed_mm.platform import get_platform
get_platform("cpu")
from megatron.driver.initialize import shutdown
from megatron.driver.watch import naming_lost_ranks
import os

def step(iterator, model):
    if os.environ["RANK"] == "1":
        raise ValueError("the sample is bad")
    return tiny.forward_step(iterator, model)

try:
    limits = ["--distributed-timeout-minutes", "0.6", "--preflight-timeout-seconds", "240"]  # also on a busy machine
    with naming_lost_ranks():
        tiny.run(tiny.arguments(*limits, world_size=2), step=step)
finally:
    shutdown()
"""


def test_the_error_of_one_rank_is_told_by_the_other():
    port = str(free_port())
    processes = []
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", FAILING],
                cwd=Path(__file__).parents[2],
                env=os.environ | place,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate(timeout=600)[1] for process in processes]
    assert "ValueError: the sample is bad" in said[1]
    assert "rank 1 on" in said[0] and "stopped: ValueError: the sample is bad. " in said[0], said[0][-1500:]


@pytest.fixture(autouse=True)
def down():
    yield
    shutdown()
