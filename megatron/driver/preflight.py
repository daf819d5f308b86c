"""Before a run: do all ranks arrive, and can they talk to each other?"""

from __future__ import annotations

import datetime
import logging
import os
import socket
import time
from collections.abc import Callable

import torch
from megatron.core import parallel_state
from torch.distributed import PrefixStore, Store, TCPStore

from megatron.driver.arguments import DriverArguments
from megatron.driver.collectives import gather
from mindspeed_mm.errors import ConfigError, TrainingError
from mindspeed_mm.platform import Platform
from mindspeed_mm.platform.distributed import no_first_rank, unreachable

logger = logging.getLogger(__name__)

PROBE_BYTES = 2**22
"""Size of the tensor that the bandwidth is measured with: large enough for more than latency, small on a CPU."""

GRID_ROWS = 64
"""Ranks that the log shows one by one."""


def open_store(args: DriverArguments) -> Store:
    """A connection to the key-value store that torchrun's environment describes; every call opens another one.

    Raises:
        ConfigError: the environment is incomplete.
        TrainingError: nobody answers at MASTER_ADDR:MASTER_PORT in time.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"RANK is set, but {', '.join(missing)} is not: start with torchrun, or set all of them")
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun keeps the store itself; without it rank 0 does.
    kept_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_host = os.environ["RANK"] == "0" and not kept_by_torchrun
    timeout = datetime.timedelta(seconds=args.preflight_timeout_seconds)
    try:
        problem = None if is_host else unreachable(host, port, args.preflight_timeout_seconds)
        if problem is not None:
            raise problem
        store = TCPStore(host, port, is_master=is_host, timeout=timeout, wait_for_workers=False, multi_tenant=True)
    except (OSError, UnicodeError, RuntimeError) as error:  # RuntimeError: DistNetworkError, DistStoreError
        rank, seconds = os.environ["RANK"], args.preflight_timeout_seconds
        raise TrainingError(no_first_rank(rank, host, port, seconds, first_line(error))) from error
    return PrefixStore(f"/mindspeed-mm/attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def sign_in(store: Store, rank: int, ranks: int, seconds: float) -> None:
    """Wait until every rank has started.

    Raises:
        TrainingError: names the ranks that have not come within `seconds`, or rank 0 where the store has gone with it.
    """
    try:
        absent, hosts = _wait_for_all(store, rank, ranks, seconds)
    except RuntimeError as error:
        raise TrainingError(
            f"rank 0, which keeps the list of ranks, was lost while rank {rank} on {_host()} waited for the others: "
            f"{first_line(error)}"
        ) from error
    if absent:
        raise TrainingError(
            f"rank(s) {_listed(absent)} of {ranks} did not start within {seconds:g} s; hosts that did: "
            f"{', '.join(hosts)}. Look at the missing ranks' hosts, NNODES, NODE_RANK and MASTER_ADDR"
        )


def _wait_for_all(store: Store, rank: int, ranks: int, seconds: float) -> tuple[list[int], list[str]]:
    """(ranks that have not come, hosts of those that have)."""
    store.set(f"here/{rank}", _host())
    names = [f"here/{number}" for number in range(ranks)]
    end = time.monotonic() + seconds
    while not store.check(names):
        if time.monotonic() > end:
            absent = [number for number, name in enumerate(names) if not store.check([name])]
            return absent, sorted({store.get(names[number]).decode() for number in set(range(ranks)) - set(absent)})
        time.sleep(0.05)
    return [], []


def try_collective(args: DriverArguments, platform: Platform, say: Callable[[str], None] = logger.info) -> None:
    """One all-reduce over the world; then say what world this is. Collective.

    Raises:
        RuntimeError: the all-reduce failed, or took longer than the preflight may; see reach.naming_unreachable.
        TrainingError: it gave a wrong sum.
    """
    ranks = torch.distributed.get_world_size()
    if ranks == 1:
        return
    seconds = _all_reduce(args, platform)
    first = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    places = gather(
        (*first, parallel_state.get_context_parallel_rank(), parallel_state.get_data_parallel_rank(), _host())
    )
    if torch.distributed.get_rank() != 0:
        return
    moved = 2 * (ranks - 1) / ranks * PROBE_BYTES  # what each rank of a ring sends
    hosts = len({place[-1] for place in places})
    say(
        f"{ranks} ranks on {hosts} host(s), backend {platform.backend} on {platform.name}: "
        f"tensor {args.tensor_model_parallel_size} x pipeline {args.pipeline_model_parallel_size} x context "
        f"{args.context_parallel_size} x data {args.data_parallel_size}; all-reduce of {PROBE_BYTES >> 20} MiB: "
        f"{moved / seconds / 1e9:.2f} GB/s"
    )
    for rank, (tensor, pipeline, context, data, host) in enumerate(places[:GRID_ROWS]):
        say(f"  rank {rank:4d}: tensor {tensor}, pipeline {pipeline}, context {context}, data {data} on {host}")
    if ranks > GRID_ROWS:
        say(f"  and {ranks - GRID_ROWS} more")


def _all_reduce(args: DriverArguments, platform: Platform) -> float:
    """Seconds of the second of two all-reduces; the first one also connects the ranks."""
    limit = datetime.timedelta(seconds=args.preflight_timeout_seconds)
    probe = torch.ones(PROBE_BYTES // 4, device=platform.device())
    for _ in range(2):
        probe.fill_(1.0)
        platform.synchronize()
        start = time.perf_counter()
        torch.distributed.all_reduce(probe, async_op=True).wait(limit)
        platform.synchronize()
        seconds = time.perf_counter() - start
    total, ranks = probe[0].item(), torch.distributed.get_world_size()
    if total != ranks:
        raise TrainingError(f"the first all-reduce gave {total} instead of {ranks}: check {platform.backend}")
    return seconds


def _host() -> str:
    return socket.gethostname()


def _listed(ranks: list[int]) -> str:
    more = len(ranks) - GRID_ROWS
    return ", ".join(map(str, ranks[:GRID_ROWS])) + (f" and {more} more" if more > 0 else "")


def first_line(error: BaseException) -> str:
    """What an error of torch's store or of a collective says, without the trace that may follow."""
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__
