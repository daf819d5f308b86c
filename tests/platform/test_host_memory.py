"""Training on the CPU keeps the memory that a step gives back, unless the user has set the C library otherwise."""

import platform as host
import resource
import subprocess
import sys

import pytest

from mindspeed_mm.platform import host_memory

FAULTS = """
import ctypes, resource, sys
from mindspeed_mm.platform import host_memory
kept = host_memory.keep_freed()
if "return" in sys.argv:
    host_memory.return_freed()
libc, size = ctypes.CDLL(None), ctypes.c_size_t(80_000_000)
libc.malloc.restype = ctypes.c_void_p
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(libc.malloc(size))
    ctypes.memset(block, 1, size.value)
    libc.free(block)
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Prints the pages that the system hands out for a second block of the size of one that was freed."""


@pytest.mark.parametrize("how", ["keep", "return"])
def test_letter_h_freed_memory_is_used_again(how):
    run = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    kept, pages = map(int, run.stdout.split())
    assert kept == (host.libc_ver()[0] == "glibc")
    touched_again = pages > 80_000_000 / resource.getpagesize() / 10
    assert not kept or touched_again == (how == "return")


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "1000"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_max=7")],
)
def test_what_the_user_has_set_stays(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _name: pytest.fail("the C library was asked"))
    assert not host_memory.keep_freed()


def test_a_c_library_without_the_switch(monkeypatch):
    for name in (*host_memory.CHOSEN_BY_USER, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _name: object())
    assert not host_memory.keep_freed()
