"""First collectives that fail: who cannot be reached."""

import json
import socket
import threading

import pytest

from mindspeed_mm.errors import TrainingError
from mindspeed_mm.platform import get_platform
from tests.helpers.memory_store import MemoryStore

get_platform("cpu")

from megatron.driver import reach  # noqa: E402

HERE = socket.gethostname()


@pytest.fixture(autouse=True)
def master(monkeypatch):
    """Somebody listens at MASTER_ADDR; nobody waits long."""
    monkeypatch.setattr(reach, "KNOCK_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        yield server.getsockname()[1]


def door(port, address="127.0.0.1"):
    return json.dumps([address, port])


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def failing(store, rank, ranks):
    with pytest.raises(TrainingError) as error, reach.naming_unreachable(store, rank, ranks, 60.0):
        raise RuntimeError("gloo: connection reset\nmore")
    return str(error.value)


def test_ranks_that_have_ended_are_named(master):
    store = MemoryStore(HERE, "host-b", "host-b", "host-c")
    store.set("door/1", door(closed_port()))
    store.set("door/2", door(master))
    said = failing(store, 0, 4)
    assert said.startswith(f"rank 0 on {HERE}: the first collectives failed (limit 60 s): gloo: connection reset. Out")
    assert f"{HERE} (rank 0) -> rank 1 on host-b (127.0.0.1: refused, its process has ended)" in said
    assert "-> rank 3 on host-c (it has ended). Look at these processes" in said
    assert "rank 2" not in said


def test_what_others_found_out_is_told(master):
    store = MemoryStore(HERE, "host-b")
    store.set("door/1", door(master))
    store.set("knocked/1", json.dumps(["host-b (rank 1) -> rank 0 on here (10.0.0.1: timed out)"]))
    assert "Out of reach: host-b (rank 1) -> rank 0 on here (10.0.0.1: timed out)" in failing(store, 0, 2)


def test_an_address_without_a_way(master):
    store = MemoryStore(HERE, "host-b")
    store.set("door/1", door(master, "no-such-host.invalid"))
    assert "rank 1 on host-b (no-such-host.invalid: [Errno" in failing(store, 0, 2)


def test_all_can_be_reached(master):
    store = MemoryStore(HERE, "host-b")
    store.set("door/1", door(master))
    assert "All ranks answer on the network of MASTER_ADDR, so the interface" in failing(store, 0, 2)


def test_the_store_has_gone():
    class Gone(MemoryStore):
        def check(self, keys):
            raise RuntimeError("connection closed")

    assert "Out of reach: rank 0, which keeps the list of ranks: connection closed" in failing(Gone(HERE, "b"), 1, 2)


def test_one_rank_of_each_host_where_there_are_many(monkeypatch):
    monkeypatch.setattr(reach, "EVERY_RANK", 3)
    said = failing(MemoryStore(HERE, HERE, "host-b", "host-b"), 1, 4)
    assert "rank 0 on" in said and "rank 2 on host-b" in said and "rank 3" not in said


def test_no_more_than_some_are_named():
    said = failing(MemoryStore(HERE, *(f"host-{number}" for number in range(20))), 0, 21)
    assert said.count("it has ended") == reach.LISTED


def test_a_backend_that_never_gives_up_is_ended(monkeypatch, caplog, master):
    """gloo tries to connect for a multiple of its time limit, and nothing gets a process out of it."""
    ended = threading.Event()
    monkeypatch.setattr(reach.os, "_exit", lambda code: ended.set() if code == 70 else None)
    store = MemoryStore(HERE, "host-b")
    store.set("door/1", door(closed_port()))
    with reach.naming_unreachable(store, 0, 2, 0.1):
        assert ended.wait(60)
    assert "the first collectives did not end within 0.1 s. Out of reach: " in caplog.text


def test_other_errors_stay_as_they_are():
    with pytest.raises(ValueError, match="^a flag$"), reach.naming_unreachable(MemoryStore(HERE), 0, 1, 60.0):
        raise ValueError("a flag")
