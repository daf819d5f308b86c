"""Which ranks can reach which: asked when the first collectives of a run fail, since their errors name nobody.

Every rank opens a port before the ranks meet and writes its address into torch's store. Knocking needs nobody who
answers: the kernel accepts the connection. A refusal says that the process has ended, silence that its host or the
way to it is down.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator

from torch.distributed import Store

from megatron.driver.preflight import first_line
from megatron.driver.watch import EXIT_CODE
from mindspeed_mm.errors import TrainingError

logger = logging.getLogger(__name__)

KNOCK_SECONDS = 3.0
"""How long one rank waits for another one's port."""

LISTED = 8
"""Ranks that are named at most as out of reach, by each rank."""

EVERY_RANK = 64
"""Up to so many ranks each of them is tried, beyond it one of each host."""


@contextlib.contextmanager
def naming_unreachable(store: Store, rank: int, ranks: int, seconds: float) -> Iterator[None]:
    """Turn the failure of a run's first collectives into one that names who cannot be reached, from where.

    Args:
        store: of torch, on a connection that nobody else uses; here/<rank> holds the name of each rank's host.
        seconds: the time limit. gloo keeps trying for a multiple of it, so the process is ended a little later.

    Raises:
        TrainingError: names them, or the interface where all can be reached.
    """

    def give_up() -> None:
        logger.error(_message(store, rank, ranks, f"did not end within {seconds:g} s"))
        os._exit(EXIT_CODE)

    limit = threading.Timer(seconds + KNOCK_SECONDS, give_up)
    limit.daemon = True
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_open_door(store, rank))
            limit.start()
            yield
        except RuntimeError as error:  # DistBackendError, and what gloo raises
            limit.cancel()
            what = f"failed (limit {seconds:g} s): {first_line(error)}"
            raise TrainingError(_message(store, rank, ranks, what)) from error
        finally:
            limit.cancel()


def _message(store: Store, rank: int, ranks: int, what: str) -> str:
    return f"rank {rank} on {socket.gethostname()}: the first collectives {what}. {_findings(store, rank, ranks)}"


@contextlib.contextmanager
def _open_door(store: Store, rank: int) -> Iterator[None]:
    address = _own_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server(("", 0), family=family, backlog=128) as door:
        store.set(f"door/{rank}", json.dumps([address, door.getsockname()[1]]))
        yield


def _own_address() -> str:
    """The address of this host on the way to MASTER_ADDR."""
    with contextlib.suppress(OSError):
        master = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        with socket.create_connection(master, KNOCK_SECONDS) as way:
            return way.getsockname()[0]
    return socket.gethostname()


def _findings(store: Store, rank: int, ranks: int) -> str:
    """What all ranks together found out, once they have knocked; of those that did so in time."""
    try:
        own = [f"{socket.gethostname()} (rank {rank}) -> {line}" for line in _knock(store, rank, ranks)]
        store.set(f"knocked/{rank}", json.dumps(own))
        knocked = _wait_for("knocked", store, ranks)
        lines = [line for number in knocked for line in json.loads(store.get(f"knocked/{number}"))]
        store.set(f"read/{rank}", "yes")
        if rank == 0:  # which may keep the store
            _wait_for("read", store, ranks)
    except RuntimeError as error:
        return f"Out of reach: rank 0, which keeps the list of ranks: {str(error).splitlines()[0][:200]}"
    if lines:
        return f"Out of reach: {'; '.join(lines[:LISTED])}. Look at these processes, hosts and the network between them"
    return (
        "All ranks answer on the network of MASTER_ADDR, so the interface that the backend chose is at fault: set "
        "GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME or HCCL_SOCKET_IFNAME to that network's"
    )


def _wait_for(word: str, store: Store, ranks: int) -> list[int]:
    """The ranks that have written the word; all of them, or those that did so in time."""
    names = {number: f"{word}/{number}" for number in range(ranks)}
    end = time.monotonic() + 2 * KNOCK_SECONDS
    while not store.check(list(names.values())) and time.monotonic() < end:
        time.sleep(0.05)
    return [number for number, name in names.items() if store.check([name])]


def _knock(store: Store, rank: int, ranks: int) -> list[str]:
    """One line for each rank whose port does not open."""
    hosts = {other: store.get(f"here/{other}").decode() for other in range(ranks)}
    first = {host: other for other, host in reversed(hosts.items())}
    wanted = range(ranks) if ranks <= EVERY_RANK else sorted(first.values())
    lines = []
    for other in wanted:
        if other == rank or len(lines) == LISTED:
            continue
        if not store.check([f"door/{other}"]):
            lines.append(f"rank {other} on {hosts[other]} (it has ended)")
            continue
        address, port = json.loads(store.get(f"door/{other}"))
        if address.startswith("127.") or address == "::1":  # what the master's own name stands for on the master
            address = os.environ["MASTER_ADDR"]
        try:
            socket.create_connection((address, port), KNOCK_SECONDS).close()
        except ConnectionRefusedError:
            lines.append(f"rank {other} on {hosts[other]} ({address}: refused, its process has ended)")
        except OSError as error:
            lines.append(f"rank {other} on {hosts[other]} ({address}: {error})")
    return lines
