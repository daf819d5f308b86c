"""Python, the libraries, the stack of the device, and the devices themselves.

Devices are asked in a process of its own: a stack that is broken may end the process that imports it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.host import versions
from mindspeed_mm.host.finding import Finding

GROUP = "devices"

PROBE = """
import importlib, importlib.util, json
found = {"cuda": [], "npu": []}
import torch
found["cuda_version"] = torch.version.cuda
if torch.cuda.is_available():
    for index in range(torch.cuda.device_count()):
        found["cuda"].append([torch.cuda.get_device_name(index), torch.cuda.get_device_properties(index).total_memory])
if importlib.util.find_spec("torch_npu") is not None:
    importlib.import_module("torch_npu")
    if torch.npu.is_available():
        for index in range(torch.npu.device_count()):
            found["npu"].append([torch.npu.get_device_name(index), torch.npu.get_device_properties(index).total_memory])
print(json.dumps(found))
"""
PROBE_SECONDS = 180

CANN_VARIABLES = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")
CANN_FILES = ("version.cfg", "compiler/version.info", "runtime/version.info")
DRIVER_FILES = {"npu": Path("/usr/local/Ascend/driver/version.info"), "cuda": Path("/proc/driver/nvidia/version")}
SET_ENV = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"


def look(device: str | None, environment: Mapping[str, str]) -> list[Finding]:
    """Findings about versions and devices.

    Args:
        device: "npu", "cuda" or "cpu", which must then be usable; None: the best that is there.
    """
    probe = ask_devices()
    findings = versions.look(device or _first(probe))
    other = versions.torch_npu_finding()
    if other is not None:
        findings += [other, cann(environment)]
    for package in ("mindspeed", "safetensors", "tokenizers", "peft"):
        version = versions.installed(package)
        findings.append(Finding(versions.GROUP, package, version or "not installed (optional)"))
    return findings + drivers() + devices(probe, device)


def ask_devices() -> dict[str, Any]:
    """What a process of its own says about the devices: names and bytes by kind, or its error under "error"."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, check=False, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"error": f"the devices did not answer within {PROBE_SECONDS} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"importing torch ended with exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def _first(probe: dict[str, Any]) -> str:
    return next((kind for kind in ("npu", "cuda") if probe.get(kind)), "cpu")


def devices(probe: dict[str, Any], device: str | None) -> list[Finding]:
    """One finding for each card, and what is wrong where `device` is not there."""
    if "error" in probe:
        change = f"torch or torch_npu cannot be imported: install one that fits, or on Ascend {SET_ENV}"
        return [Finding(GROUP, "torch", probe["error"], "bad", change)]
    findings = [
        Finding(GROUP, f"{kind}:{index}", f"{name}, {memory / 2**30:.1f} GiB", *_generation(kind, name))
        for kind in ("npu", "cuda")
        for index, (name, memory) in enumerate(probe[kind])
    ]
    if probe.get("cuda_version"):
        findings.append(Finding(GROUP, "CUDA of torch", probe["cuda_version"]))
    if device in ("npu", "cuda") and not probe[device]:
        return [*findings, Finding(GROUP, device, "no device", "bad", _where_it_may_be(device))]
    if not findings:
        change = "training and inference run on the CPU: right for trying, too slow for models of billions"
        return [Finding(GROUP, "accelerator", "none", "ok", change)]
    return findings


def _generation(kind: str, name: str) -> tuple[str, str]:
    """Level and change for a card of that name."""
    from mindspeed_mm.host.cards import judge

    return judge(name) if kind == "npu" else ("ok", "")


def _where_it_may_be(device: str) -> str:
    if device == "npu":
        return (
            f"npu-smi info must list it; install driver, CANN and torch_npu, {SET_ENV}, see ASCEND_RT_VISIBLE_DEVICES"
        )
    return "nvidia-smi must list it; install a torch with CUDA, and look at CUDA_VISIBLE_DEVICES"


def cann(environment: Mapping[str, str]) -> Finding:
    """The toolkit that the environment names. Bad where none is."""
    homes = [environment[name] for name in CANN_VARIABLES if environment.get(name)]
    if not homes:
        return Finding(GROUP, "CANN", "not in the environment", "bad", f"torch_npu needs it: {SET_ENV}")
    for name in CANN_FILES:
        file = Path(homes[0]) / name
        match = re.search(r"\d+\.\d+[\w.]*", file.read_text(encoding="utf-8")) if file.is_file() else None
        if match is not None:
            return Finding(GROUP, "CANN", match[0])
    change = "the folder that the environment names holds no version file: install CANN there, or source its set_env.sh"
    return Finding(GROUP, "CANN", homes[0] if os.path.isdir(homes[0]) else f"{homes[0]} is no folder", "warn", change)


def drivers(files: Mapping[str, Path] = DRIVER_FILES) -> list[Finding]:
    """The versions of installed drivers."""
    found = []
    for kind, file in files.items():
        match = re.search(r"\d+\.\d+[\w.]*", file.read_text(encoding="utf-8")) if file.is_file() else None
        if match is not None:
            found.append(Finding(GROUP, f"{kind} driver", match[0]))
    return found


def cards_of(findings: list[Finding], device: str | None) -> tuple[str, int]:
    """(the device that is meant, how many cards of it `devices` found); the CPU has none."""
    kinds = [finding.name.partition(":")[0] for finding in findings if finding.group == GROUP and ":" in finding.name]
    meant = device or next((kind for kind in ("npu", "cuda") if kind in kinds), "cpu")
    return meant, kinds.count(meant)
