"""Memory that a training step on the CPU gives back stays with the process, for the next step.

glibc returns large blocks to the system as soon as they are free. The next step asks for the same blocks again, and the
system hands them out page by page, each filled with zeros: a tensor's first touch takes three times as long as its
second, a whole step up to 8 % longer (docs/performance.md). Devices' allocators keep what is freed, and so does this.
"""

from __future__ import annotations

import ctypes
import os

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""Parameters of glibc's mallopt (malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX)."""
NEVER, NONE = -1, 0
LARGE, BLOCKS = 2**25, 65536
"""Bytes that glibc by itself comes to hold for a large block, once such ones were freed; and large blocks at most."""
CHOSEN_BY_USER = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
TUNABLES = ("mmap_max", "mmap_threshold", "trim_threshold", "top_pad")
"""What of the environment glibc reads for the same thing."""

_kept = False


def keep_freed() -> bool:
    """Tell glibc to keep what is freed; True where that was done.

    It is left alone where the user has set its variables, and where the C library has no such switch.
    """
    global _kept
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if any(name in os.environ for name in CHOSEN_BY_USER) or any(f"malloc.{name}" in tunables for name in TUNABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    _kept = mallopt is not None and bool(mallopt(TRIM_THRESHOLD, NEVER)) and bool(mallopt(MMAP_MAX, NONE))
    return _kept


def return_freed() -> None:
    """Let large blocks go back to the system again, where `keep_freed` has kept them, also before a fork: a process
    that decodes images would else stay as large as its largest one."""
    global _kept
    if _kept:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_MAX, BLOCKS)
        mallopt(MMAP_THRESHOLD, LARGE)
        mallopt(TRIM_THRESHOLD, 2 * LARGE)
        _kept = False
