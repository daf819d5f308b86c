"""Memory, shared memory, disk, limits, the port of the ranks and the network interfaces."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

import psutil

from mindspeed_mm.host.finding import Finding, Level

GROUP = "host"
NETWORK = "network"

GIB = 2**30
LEAST_MEMORY = 16 * GIB
LEAST_SHARED = 2 * GIB
"""Below it loader workers with images of a usual size run out; Docker gives 64 MiB unless told otherwise."""

USELESS_SHARED = GIB // 8
LEAST_DISK = 50 * GIB
"""A checkpoint of 7B with its optimizer takes about 95 GB."""

USELESS_DISK = GIB
LEAST_FILES = 4096
DEFAULT_PORT = 29500
INTERFACE_VARIABLES = ("HCCL_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def look(environment: Mapping[str, str]) -> list[Finding]:
    """Findings about this host and its network."""
    memory = psutil.virtual_memory()
    return [
        Finding(GROUP, "processor", f"{os.cpu_count()} cores, {len(os.sched_getaffinity(0))} of them for this process"),
        room("memory", memory.available, memory.total, LEAST_MEMORY, 0, "free memory: loading weights needs some"),
        shared(Path("/dev/shm")),
        disk(Path.cwd()),
        open_files(),
        port(environment),
        *interfaces(environment),
    ]


def room(name: str, free: int, total: int, wanted: int, needed: int, change: str) -> Finding:
    """A finding about free bytes: bad at or below `needed`, warn below `wanted`."""
    level: Level = "bad" if free <= needed else "warn" if free < wanted else "ok"
    found = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    return Finding(GROUP, name, found, level, "" if level == "ok" else change)


def shared(folder: Path) -> Finding:
    """The file system through which loader workers hand over batches."""
    if not folder.is_dir():
        return Finding(GROUP, "shared memory", f"no {folder}", "bad", "mount it (docker run --shm-size=16g)")
    usage = shutil.disk_usage(folder)
    change = "loader workers hand batches over here: docker run --shm-size=16g, or --num-workers 0"
    return room("shared memory", usage.free, usage.total, LEAST_SHARED, USELESS_SHARED, change)


def disk(folder: Path) -> Finding:
    """Room for checkpoints where the command is started."""
    usage = shutil.disk_usage(folder)
    change = "a checkpoint of 7B with its optimizer takes about 95 GB: save elsewhere, or with --no-save-optim"
    return room("disk", usage.free, usage.total, LEAST_DISK, USELESS_DISK, change)


def open_files() -> Finding:
    """The limit of open files, which loaders and gloo use up."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    endless = limit == resource.RLIM_INFINITY
    few = not endless and limit < LEAST_FILES
    change = f"ulimit -n {LEAST_FILES} or more" if few else ""
    return Finding(GROUP, "open files", "unlimited" if endless else f"at most {limit}", "warn" if few else "ok", change)


def port(environment: Mapping[str, str]) -> Finding:
    """Whether the port at which ranks meet is free here. A port out of range is a finding of the variables."""
    text = environment.get("MASTER_PORT", str(DEFAULT_PORT))
    if not text.isdigit() or not 0 < int(text) < 65536:
        return Finding(NETWORK, "MASTER_PORT", repr(text), "bad", "expected a port from 1 to 65535")
    with socket.socket() as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind(("", int(text)))
        except OSError as error:
            change = "another run may have it: set MASTER_PORT to a free one"
            return Finding(NETWORK, "port", f"{text}: {error.strerror}", "warn", change)
    return Finding(NETWORK, "port", f"{text} is free")


def interfaces(environment: Mapping[str, str]) -> list[Finding]:
    """Interfaces that are up, and those that the backends' variables name."""
    state = psutil.net_if_stats()
    addresses = psutil.net_if_addrs()
    up = {
        name: [address.address for address in addresses.get(name, ()) if address.family == socket.AF_INET]
        for name in state
        if state[name].isup
    }
    listed = ", ".join(f"{name} ({', '.join(own) or 'no IPv4'})" for name, own in up.items())
    findings = [Finding(NETWORK, "interfaces", listed or "none", "ok" if up else "bad", "" if up else "bring one up")]
    for variable in INTERFACE_VARIABLES:
        if variable in environment:
            findings.append(_named_interface(variable, environment[variable], list(up)))
    return findings


def _named_interface(variable: str, text: str, up: list[str]) -> Finding:
    """The backends take beginnings of names behind commas; `=` wants whole names, `^` excludes."""
    if text.startswith("^"):
        return Finding(NETWORK, variable, text)
    whole = text.startswith("=")
    names = [name for name in text.lstrip("=").split(",") if name]
    fits = any(name == wanted if whole else name.startswith(wanted) for name in up for wanted in names)
    if fits:
        return Finding(NETWORK, variable, text)
    return Finding(
        NETWORK, variable, repr(text), "bad", f"no such interface is up; there are {', '.join(up) or 'none'}"
    )
