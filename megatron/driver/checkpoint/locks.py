"""One run at a time may write to a save folder.

The lock is the kernel's (flock) on SAVE/.lock: it ends with the process that holds it, however that ends. Linux passes
it on to NFS servers, which also end it some time after they have last heard of the host. What the file says is for
people only.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from pathlib import Path

from mindspeed_mm.errors import CheckpointError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"

_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)
"""What flock answers on file systems without it, such as Lustre mounted without -o flock."""

_held: dict[str, int] = {}


def acquire(save: Path) -> None:
    """Take the lock of a save folder until `release_all` or the end of the process. Harmless where it is held already.

    Raises:
        CheckpointError: another process holds it.
    """
    key = str(save.resolve())
    if key in _held:
        return
    handle = os.open(save / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(handle, 1000).decode("utf-8", errors="replace").strip()
        os.close(handle)
        raise CheckpointError(
            f"--save {save} is in use by another run ({holder or 'unknown'}): stop that run, or choose another folder"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning(
            "the file system of --save %s knows no locks (%s): see to it yourself that no second run writes there",
            *(save, error),
        )
    os.ftruncate(handle, 0)
    os.write(handle, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode())
    _held[key] = handle


def release_all() -> None:
    """Give back the locks of this process."""
    while _held:
        os.close(_held.popitem()[1])


def _forget() -> None:
    """A forked worker must not keep the lock of a parent that dies."""
    release_all()


os.register_at_fork(after_in_child=_forget)
