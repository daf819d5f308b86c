"""What NpuPlatform looks at before a run, and what it tells of its card."""

import contextlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.host import versions
from mindspeed_mm.platform.npu import NpuPlatform
from tests.npu.conftest import STAND_IN


@contextlib.contextmanager
def card(**changes):
    """Another card for a moment."""
    import torch_npu

    kept = dict(torch_npu.npu.CARD)
    torch_npu.npu.CARD.update(changes)
    try:
        yield
    finally:
        torch_npu.npu.CARD.update(kept)


def first_look(variables: dict[str, str], **changes) -> tuple[str, list[str]]:
    """(error or "", warnings) of a platform that is made anew."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("mindspeed_mm.platform.npu")
    logger.addHandler(handler)
    os.environ.update(variables)
    try:
        with card(**changes):
            NpuPlatform()
    except ConfigError as error:
        return str(error), records
    finally:
        logger.removeHandler(handler)
        for name in variables:
            del os.environ[name]
    return "", records


@pytest.mark.parametrize(
    ("variables", "changes", "error"),
    [
        ({"HCCL_CONNECT_TIMEOUT": "60"}, {}, "HCCL_CONNECT_TIMEOUT '60': expected an integer in [120, 7200] s"),
        ({"TASK_QUEUE_ENABLE": "3"}, {}, "TASK_QUEUE_ENABLE '3': expected one of 0, 1, 2"),
        ({"LOCAL_RANK": "2"}, {"count": 2}, "LOCAL_RANK is 2 but this host shows 2 NPU(s)"),
        ({}, {"name": "Ascend310P3"}, "NPU Ascend310P3: npu_fusion_attention and bfloat16 exist from Atlas A2 on"),
        ({"HCCL_CONNECT_TIMEOUT": "7200"}, {}, ""),
    ],
)
def test_what_is_wrong_is_said_before_the_first_step(npu_ranks, variables, changes, error):
    ((found, warned),) = npu_ranks(1).run(_first_look, variables, changes)
    assert (error in found) if error else (found == "")
    assert not warned


def _first_look(variables, changes):
    return first_look(variables, **changes)


def test_an_unknown_card_is_told(npu_ranks):
    ((error, warned),) = npu_ranks(1).run(_first_look, {}, {"name": "Ascend960"})
    assert not error and "run mindspeed-mm doctor --parity first" in warned[0]


def figures() -> dict:
    from mindspeed_mm.platform import current_platform

    platform = current_platform()
    platform.synchronize()
    platform.seed(5)
    state = platform.device_rng_state()
    first = torch.rand(3, device=platform.device())
    platform.set_device_rng_state(state)
    with platform.profiler() as profile:
        torch.ones(2) + 1
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"snapshot_{os.getpid()}"
    try:
        written = platform.memory_snapshot(path) and path.exists()
    finally:
        path.unlink(missing_ok=True)
    shorter = torch.npu.conv.allow_hf32
    platform.keep_float32_whole()
    return {
        "whole": shorter and not torch.npu.conv.allow_hf32 and not torch.npu.matmul.allow_hf32,
        "device": str(platform.device()),
        "total": platform.memory().total,
        "again": torch.equal(first, torch.rand(3, device=platform.device())),
        "events": len(profile.key_averages()) > 0,
        "snapshot": written,
        "peak": platform.peak_flops(torch.bfloat16),
    }


def test_figures(npu_ranks):
    (found,) = npu_ranks(1).run(figures)
    wanted = {
        "whole": True,
        "device": "npu:0",
        "total": 65536.0,
        "again": True,
        "events": True,
        "snapshot": True,
        "peak": None,
    }
    assert found == wanted


def test_torch_npu_without_cann(monkeypatch):
    def no_library(name):
        raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("mindspeed_mm.platform.npu.importlib.import_module", no_library)
    with pytest.raises(ConfigError, match=r"cannot be imported \(libhccl.so.*needs CANN.*set_env.sh.*--device cpu"):
        NpuPlatform.is_available()


def test_another_torch_than_torch_npus(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(versions, "installed", lambda package: {"torch_npu": "2.7.1", "torch": "2.13.0"}.get(package))
    with pytest.raises(ConfigError, match="torch_npu 2.7.1: was made for torch 2.7.1, found torch 2.13.0"):
        NpuPlatform.is_available()


def in_a_process(code: str, *folders: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([*folders, STAND_IN, os.getcwd()])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_mindspeed_adapts_megatron_core_where_it_is_installed(tmp_path):
    """Its adaptor imports megatron.core, which asks for the current platform: there is one."""
    package = tmp_path / "mindspeed"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "megatron_adaptor.py").write_text(
        "import mindspeed_mm\nimport megatron.core\nfrom mindspeed_mm.platform import current_platform\n"
        "PLATFORM = current_platform()\n"
    )
    code = (
        "import sys, mindspeed_mm\nfrom mindspeed_mm.platform import get_platform\n"
        "platform = get_platform('npu')\nimport mindspeed.megatron_adaptor as adaptor\n"
        "assert adaptor.PLATFORM is platform is get_platform()\n"
        "assert 'mindspeed_mm.platform.npu_megatron' not in sys.modules\n"
    )
    done = in_a_process(code, str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_megatron_core_must_not_be_imported_before_the_npu_is_chosen(tmp_path):
    code = (
        "import sys, types\nsys.modules['megatron.core'] = types.ModuleType('megatron.core')\n"
        "from mindspeed_mm.platform.npu_megatron import install\ninstall()\n"
    )
    assert "megatron.core was imported before the platform was chosen" in in_a_process(code).stderr


def test_the_npu_comes_first_and_the_doctor_sees_it(tmp_path):
    code = "from mindspeed_mm.cli.main import main\nimport sys\nsys.exit(main(['doctor', '--json']))"
    done = in_a_process(code)
    assert "npu:7" in done.stdout and "Ascend910B3, 64.0 GiB" in done.stdout, done.stderr


@pytest.mark.slow
def test_the_whole_comparison_on_the_stand_in(tmp_path):
    """Processes of its own for the CPU, the card, and two ranks of cards."""
    report = tmp_path / "parity.json"
    line = f"['doctor', '--parity', '--device', 'npu', '--report', {str(report)!r}]"
    done = in_a_process(f"from mindspeed_mm.cli.main import main\nimport sys\nsys.exit(main({line}))")
    assert done.returncode == 0, done.stderr
    told = json.loads(report.read_text())["parity"]
    assert (told["device"], told["verdict"]) == ("npu", "equal")
    assert {"collective", "operator", "trajectory"} <= {row["kind"] for row in told["rows"]}
