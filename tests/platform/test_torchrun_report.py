"""torchrun's own report goes to a file; the screen gets one line."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from mindspeed_mm.platform import torchrun
from tests.helpers.killed_runs import free_port

ROOT = Path(__file__).parents[2]
HEARD = "SIGTERM,SIGHUP,SIGQUIT"


def launch(tmp_path, program, port, monkeypatch):
    """(exit code, what the screen shows) of torchrun on a program."""
    monkeypatch.setenv("TORCHRUN_REPORT", str(tmp_path / "report.log"))
    monkeypatch.delenv("MASTER_PORT", raising=False)
    script = tmp_path / "program.py"
    script.write_text(program)
    torch_run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--logs-specs", "mindspeed_mm"]
    command = [*torch_run, "--master_addr", "127.0.0.1", "--master_port", str(port), str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_letter_k_the_ranks_words_come_before_one_line(tmp_path, monkeypatch):
    program = "import sys; sys.exit(print('what went wrong', file=sys.stderr) or 3)"
    code, said = launch(tmp_path, program, free_port(), monkeypatch)
    report = tmp_path / "report.log"
    line = f"torchrun: rank 0 ended with exit code 3, the message above says why; its report: {report}"
    assert code == 1 and said.splitlines() == ["what went wrong", line]
    assert "ChildFailedError" in report.read_text() and "Traceback" in report.read_text()


def test_a_port_in_use_is_one_line(tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        code, said = launch(tmp_path, "", port, monkeypatch)
    (line,) = said.splitlines()
    assert code == 1 and f"port {port} of this host is in use" in line and "set MASTER_PORT to a free one" in line


WAITING = """
import datetime, os, signal, sys, threading, torch
from mindspeed_mm.platform.torchrun import ReportToFile

signal.signal(signal.SIGINT, signal.default_int_handler)
specs = ReportToFile()
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
torch.distributed.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False, timeout=datetime.timedelta(seconds=30))
"""


def test_letter_k_torchrun_hears_ctrl_c_while_it_waits_for_the_first_host():
    command = [sys.executable, "-c", WAITING, str(free_port())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "torchrun: stopped by SIGINT\n")


def test_ctrl_c_is_left_to_torchrun_when_the_ranks_start(monkeypatch):
    monkeypatch.setattr(DefaultLogsSpecs, "reify", lambda self, envs: "files")
    specs = object.__new__(torchrun.ReportToFile)
    specs._listening = torchrun._EarlyInterrupt()
    assert [specs.reify({}), specs.reify({})] == ["files", "files"]
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize(("handler", "left"), [(signal.SIG_IGN, "SIGTERM,SIGQUIT"), (signal.SIG_DFL, HEARD)])
def test_letter_k_torchrun_is_deaf_to_a_closed_terminal_under_nohup(monkeypatch, handler, left):
    monkeypatch.setenv(torchrun.HEARD_VARIABLE, HEARD)
    monkeypatch.setattr(DefaultLogsSpecs, "reify", lambda self, envs: "files")
    before = signal.signal(signal.SIGHUP, handler)
    try:
        assert object.__new__(torchrun.ReportToFile).reify({}) == "files"
    finally:
        signal.signal(signal.SIGHUP, before)
    assert os.environ[torchrun.HEARD_VARIABLE] == left


def test_what_is_said(monkeypatch):
    for code, words in ((-9, r"9 \(SIGKILL\), .* no memory left"), (-11, r"11 \(SIGSEGV\), .* compiled library")):
        failure = ProcessFailure(local_rank=1, pid=7, exitcode=code, error_file="none")
        said = torchrun.summary(ChildFailedError("x", {1: failure}))
        assert re.fullmatch(f"rank 1 ended with signal {words}.*", said)
    assert torchrun.summary(SignalException("", signal.SIGINT)) == "stopped by SIGINT"
    assert torchrun.summary(ValueError("a\nb")) == "a"
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.setattr(sys, "argv", ["torchrun", "--master-port=7"])
    assert torchrun.summary(OSError("EADDRINUSE")).startswith("port 7 of")


def test_a_report_that_cannot_be_written_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHRUN_REPORT", str(tmp_path / "no" / "report.log"))
    report = torchrun._Report(torchrun.report_path())
    error = ValueError("it")
    report(ValueError, error, None)
    said = capsys.readouterr().err
    assert "could not be written" in said and "ValueError: it" in said


def test_the_folder_of_the_report(monkeypatch):
    monkeypatch.delenv("TORCHRUN_REPORT", raising=False)
    assert torchrun.report_path().name.startswith("torchrun_")
