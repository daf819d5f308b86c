"""`mindspeed-mm doctor`: the screen, its exit code, and the bundle."""

import json
import os
import socket
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
from rich.console import Console

from mindspeed_mm.cli.main import main
from mindspeed_mm.doctor import bundle, machine, report, software
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.host.finding import Finding

NO_DEVICE = {"cuda": [], "npu": [], "cuda_version": None}
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def no_devices(monkeypatch):
    """The devices answer at once that there are none."""
    monkeypatch.setattr(software, "ask_devices", lambda: NO_DEVICE)


def test_a_host_that_is_ready(no_devices, capsys):
    assert main(["doctor", "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    result = json.loads(out[-1])
    assert result["verdict"] in ("ok", "warn") and result["counts"]["bad"] == 0
    assert {"versions", "devices", "host", "network"} <= {finding["group"] for finding in result["findings"]}
    assert "run together by us (cpu)" in "".join(out) and "megatron-core 0.16.1" in "".join(result["tested"])


def test_what_is_bad_ends_with_1(no_devices, capsys, monkeypatch):
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "60")
    assert main(["doctor", "--device", "npu", "--json"]) == 1
    captured = capsys.readouterr()
    assert "HCCL_CONNECT_TIMEOUT '60': expected an integer in [120, 7200] s" in captured.err
    assert "npu no device: npu-smi info must list it" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["verdict"] == "bad"


def test_torch_is_asked_in_a_process_of_its_own():
    assert software.ask_devices()["npu"] == []


def test_a_stack_that_ends_its_process(monkeypatch):
    monkeypatch.setattr(software, "PROBE", "raise ImportError('libhccl.so: cannot open shared object file')")
    (found,) = software.devices(software.ask_devices(), None)
    assert found.level == "bad" and "libhccl.so" in found.found and "set_env.sh" in found.change


def test_devices_that_do_not_answer(monkeypatch):
    monkeypatch.setattr(software, "PROBE_SECONDS", 0.01)
    assert "did not answer" in software.ask_devices()["error"]


def test_cards_are_listed():
    probe = {
        "cuda": [["NVIDIA H200", 2**37]],
        "npu": [["Ascend910B3", 2**36], ["Ascend310P3", 2**34]],
        "cuda_version": "13",
    }
    levels = {finding.name: finding.level for finding in software.devices(probe, "npu")}
    assert levels == {"npu:0": "ok", "npu:1": "bad", "cuda:0": "ok", "CUDA of torch": "ok"}
    (found,) = [each for each in software.devices(NO_DEVICE, "cuda") if each.level == "bad"]
    assert "nvidia-smi" in found.change


def test_cann(tmp_path):
    assert "set_env.sh" in software.cann({}).change and software.cann({}).level == "bad"
    assert software.cann({"ASCEND_HOME_PATH": str(tmp_path / "gone")}).level == "warn"
    (tmp_path / "version.cfg").write_text("runtime_running_version=[8.5.0:9.1.0]\n")
    assert software.cann({"ASCEND_TOOLKIT_HOME": str(tmp_path)}) == Finding("devices", "CANN", "8.5.0")


def test_torch_npu_is_reported_with_cann(no_devices, monkeypatch):
    real = software.versions.installed
    pretended = {"torch_npu": "2.7.1", "torch": "2.7.1"}
    monkeypatch.setattr(software.versions, "installed", lambda package: pretended.get(package) or real(package))
    names = {finding.name: finding.level for finding in software.look(None, {})}
    assert names["torch_npu"] == "ok" and names["CANN"] == "bad"


def test_drivers(tmp_path):
    file = tmp_path / "version.info"
    file.write_text("Version=25.2.0\n")
    assert software.drivers({"npu": file, "cuda": tmp_path / "none"}) == [Finding("devices", "npu driver", "25.2.0")]


@pytest.mark.parametrize(("free", "level"), [(2**26, "bad"), (2**30, "warn"), (2**34, "ok")])
def test_shared_memory(monkeypatch, free, level):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: Usage(2**35, 2**35 - free, free))
    found = machine.shared(Path("/"))
    assert found.level == level and ("--shm-size" in found.change) == (level != "ok")


def test_no_shared_memory(tmp_path):
    assert machine.shared(tmp_path / "none").level == "bad"


@pytest.mark.parametrize(("free", "level"), [(2**29, "bad"), (2**33, "warn"), (2**40, "ok")])
def test_disk(monkeypatch, free, level):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: Usage(2**41, 0, free))
    assert machine.disk(Path("/")).level == level


@pytest.mark.parametrize(("limit", "level"), [(1024, "warn"), (2**16, "ok"), (-1, "ok")])
def test_open_files(monkeypatch, limit, level):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _kind: (limit, limit))
    assert machine.open_files().level == level


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as server:
        taken = server.getsockname()[1]
        found = machine.port({"MASTER_PORT": str(taken)})
    assert found.level == "warn" and "set MASTER_PORT" in found.change
    assert machine.port({"MASTER_PORT": "high"}).level == "bad"


@pytest.mark.parametrize(
    ("text", "level"), [("lo", "ok"), ("=lo,x", "ok"), ("^docker", "ok"), ("=l", "bad"), ("no", "bad")]
)
def test_named_interfaces(text, level):
    found = machine.interfaces({"HCCL_SOCKET_IFNAME": text})
    assert [each.level for each in found if each.name == "HCCL_SOCKET_IFNAME"] == [level]


def test_the_screen_fits_a_narrow_terminal():
    with Console(width=60, record=True, file=open(os.devnull, "w")) as console:
        report.show([Finding("host", "disk", "1 of 2 GiB free", "warn", "save elsewhere " * 9)], console)
    assert "0 ok, 1 warn, 0 bad" in console.export_text()


def test_the_bundle_holds_no_names(tmp_path, no_devices, capsys, monkeypatch):
    monkeypatch.setattr(bundle.getpass, "getuser", lambda: "melanie")
    monkeypatch.setattr(bundle.socket, "gethostname", lambda: "node17.example.org")
    monkeypatch.setattr(bundle.Path, "home", lambda: Path("/home/melanie"))
    monkeypatch.setenv("HCCL_WHITELIST_TOKEN", "swordfish")
    monkeypatch.setenv("PRIVATE_THING", "private thing")
    log = tmp_path / "run.log"
    log.write_text(
        "rank 0 on node17: melanie@example.org 10.1.2.3 fe80::1:2:3 /home/melanie/data api_key=hunter2 loss 0.5\n"
    )
    target = tmp_path / "report.zip"
    assert main(["doctor", "--bundle", str(target), "--log", str(log)]) == 0
    assert f"written: {target}" in capsys.readouterr().out
    with zipfile.ZipFile(target) as archive:
        assert archive.namelist() == ["doctor.json", "packages.txt", "environment.txt", "log_0_run.log"]
        texts = {name: archive.read(name).decode() for name in archive.namelist()}
    assert texts["log_0_run.log"].strip() == "rank 0 on HOST: MAIL ADDRESS ADDRESS HOME/data api_key=REDACTED loss 0.5"
    assert "megatron-core==0.16.1" in texts["packages.txt"]
    whole = "".join(texts.values())
    assert not [word for word in ("melanie", "node17", "10.1.2.3", "swordfish", "private", "hunter2") if word in whole]
    assert "HCCL_WHITELIST_TOKEN=REDACTED" in texts["environment.txt"]
    json.loads(texts["doctor.json"])


def test_a_bundle_that_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match="--bundle .*no/report.zip: .*No such file"):
        bundle.write_bundle(tmp_path / "no" / "report.zip", {}, {})
    with pytest.raises(ConfigError, match="missing.log: No such file"):
        bundle.write_bundle(tmp_path / "report.zip", {}, {}, [tmp_path / "missing.log"])


def test_a_log_needs_a_bundle(capsys):
    assert main(["doctor", "--log", "x"]) == 1
    assert "give --bundle" in capsys.readouterr().err


def test_the_doctor_needs_no_torch_itself():
    """A torch that cannot be imported is what it is asked about."""
    ask = (
        "import sys; sys.modules['torch'] = None; from mindspeed_mm.doctor import report, bundle, machine, software\n"
        "software.ask_devices = lambda: {'error': 'broken'}\n"
        "sys.exit(len([x for x in report.examine() if x.level == 'bad']) != 1)"
    )
    assert subprocess.run([sys.executable, "-c", ask], check=False).returncode == 0
