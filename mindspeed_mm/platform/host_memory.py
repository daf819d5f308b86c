"""Memory that a training step on the CPU gives back stays with the process, for the next step.

glibc returns large blocks to the system as soon as they are free. The next step asks for the same blocks again, and the
system hands them out page by page, each filled with zeros: a tensor's first touch takes three times as long as its
second, a whole step up to 8 % longer (docs/performance.md). Devices' allocators keep what is freed, and so does this.
"""

from __future__ import annotations

import ctypes
import os

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt (malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX)."""
NEVER, NONE = -1, 0
CHOSEN_BY_USER = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
"""Variables of the environment that glibc reads for the same thing."""


def keep_freed() -> bool:
    """Tell glibc to keep what is freed; True where that was done.

    It is left alone where the user has set its variables, and where the C library has no such switch.
    """
    if any(name in os.environ for name in CHOSEN_BY_USER) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(TRIM_THRESHOLD, NEVER)) and bool(mallopt(MMAP_MAX, NONE))
