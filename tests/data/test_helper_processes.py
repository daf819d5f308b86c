"""Processes that read the records of a file together: their order, their errors, and their end."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mindspeed_mm.data.parallel import ordered
from mindspeed_mm.errors import DataError

ROOT = Path(__file__).parents[2]


def all_of(work, count=20):
    """What two processes bring of `count` records, two at a time. None of them is left."""
    before = set(psutil.Process().children())
    try:
        with ordered(work, count, processes=2, alone_below=0, chunk=2) as parts:
            return list(parts)
    finally:
        # A killed process of a busy machine may take a while to go.
        assert not psutil.wait_procs(set(psutil.Process().children()) - before, timeout=30)[1]


def test_results_come_in_order():
    assert all_of(list) == [[number, number + 1] for number in range(0, 20, 2)]
    assert all_of(list, 2) == [[0, 1]]
    assert len(set(all_of(lambda numbers: os.getpid()))) == 2


@pytest.mark.parametrize("error", [DataError("record 4 is bad"), FileNotFoundError(2, "gone", "a.json")])
def test_an_error_comes_out_as_it_was(error):
    def work(numbers):
        if numbers.start == 4:
            raise error
        return numbers

    with pytest.raises(type(error)) as caught:
        all_of(work)
    assert str(caught.value) == str(error)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_letter_j_a_killed_process_ends_the_reading(name):
    """A multiprocessing.Pool would wait for ever."""

    def work(numbers):
        if numbers.start == 4:
            os.kill(os.getpid(), signal.Signals[name])
        return numbers

    with pytest.raises(DataError, match=rf"ended from outside \({name}\).*no memory left.*fewer cores"):
        all_of(work)


def test_the_first_record_that_is_wrong_is_named_whichever_is_found_first():
    later = multiprocessing.get_context("fork").Event()

    def work(numbers):
        if numbers.start == 2:
            assert later.wait(30)
            raise DataError("record 2 is bad")
        if numbers.start == 4:
            later.set()
            raise DataError("record 4 is bad")
        return numbers

    with pytest.raises(DataError, match="record 2 is bad"):
        all_of(work)


def test_letter_j_a_fault_of_a_library_is_not_put_down_to_memory():
    with pytest.raises(RuntimeError, match="ended with SIGSEGV, a fault of a compiled library"):
        all_of(lambda numbers: os.kill(os.getpid(), signal.SIGSEGV))


def test_letter_j_a_process_that_fails_shows_why(capfd):
    with pytest.raises(RuntimeError, match="its own traceback stands above"):
        all_of(lambda numbers: numbers.start / 0)
    assert "ZeroDivisionError" in capfd.readouterr().err


GROUP = """
import os, signal
from mindspeed_mm.data.parallel import ordered
signal.signal(signal.SIGINT, signal.default_int_handler)
os.setpgid(0, 0)
with ordered(lambda numbers: numbers.start, 8, processes=2, alone_below=0, chunk=1) as parts:
    for part in parts:
        if part == 2:
            os.killpg(0, signal.SIGINT)
"""


def test_letter_k_the_processes_leave_ctrl_c_to_their_parent():
    """Each would show a traceback of its own."""
    done = subprocess.run([sys.executable, "-c", GROUP], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.count("Traceback") == done.stderr.count("KeyboardInterrupt\n") == 1
