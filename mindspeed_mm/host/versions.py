"""Versions that were run together, versions that are known not to work, and how the installed ones compare."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import re
from dataclasses import dataclass

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.host.finding import Finding

logger = logging.getLogger(__name__)

GROUP = "versions"


@dataclass(frozen=True)
class VersionSet:
    """Versions that belong together; "" where the set says nothing."""

    device: str
    python: str
    torch: str
    megatron_core: str
    transformers: str = ""
    torch_npu: str = ""
    cann: str = ""
    mindspeed: str = ""
    source: str = ""

    def __str__(self) -> str:
        named = {
            "Python": self.python,
            "torch": self.torch,
            "torch_npu": self.torch_npu,
            "CANN": self.cann,
            "megatron-core": self.megatron_core,
            "MindSpeed": self.mindspeed,
            "transformers": self.transformers,
        }
        return ", ".join(f"{name} {version}" for name, version in named.items() if version)


TESTED = (
    VersionSet("cpu", "3.11", "2.13.0", "0.16.1", "5.23.0", source="every test of this project"),
    VersionSet("cpu", "3.11", "2.13.0", "0.16.0", "5.23.0", source="training, resuming, generation, conversion"),
    VersionSet("cpu", "3.10", "2.13.0", "0.16.1", "5.20.2", source="training, resuming, generation, conversion"),
    VersionSet("cpu", "3.10", "2.13.0", "0.16.0", "5.20.2", source="training, resuming, generation, conversion"),
    VersionSet("cpu", "3.11", "2.13.0", "0.12.1", "5.23.0", source="training, resuming, generation, conversion"),
    VersionSet("cpu", "3.10", "2.13.0", "0.12.1", "5.20.2", source="training, resuming, generation, conversion"),
    VersionSet("npu", "3.11", "2.13.0", "0.16.1", "5.23.0", source="a stand-in for torch_npu, on no NPU"),
)
"""What was run."""

PAIRED = (
    VersionSet(
        "npu", "3.10", "2.7.1", "0.12.1", torch_npu="2.7.1", cann="9.1.0", mindspeed="26.1.0", source="vendor's page"
    ),
    VersionSet("npu", "3.11", "2.7.1", "0.16.0", torch_npu="2.7.1", mindspeed="core_r0.16.0", source="ms-swift's page"),
)
"""What others state to belong together on Ascend; not run by us."""


@dataclass(frozen=True)
class Broken:
    """Versions of a package from `since` to below `below` that cannot be used."""

    package: str
    below: str
    reason: str
    instead: str
    since: str = "0"


CORE = "pip install 'megatron-core>=0.16,<0.17', or 0.12.1 beside MindSpeed 26.1"

BROKEN = (
    Broken("Python", "3.10", "the code uses syntax of 3.10", "a Python 3.10 to 3.12"),
    Broken("torch", "2.5", "its scaled_dot_product_attention has no grouped heads (enable_gqa)", "torch 2.6 or newer"),
    Broken("megatron-core", "0.12.1", "nobody ran it here", CORE),
    Broken("megatron-core", "0.16", "its distributed optimizer stores no whole tensors", CORE, "0.13"),
)

TABLE = {"Python": "python", "torch": "torch", "megatron-core": "megatron_core", "transformers": "transformers"}
"""What is compared with TESTED: name of the package -> field of the set."""


def installed(package: str) -> str | None:
    """The version of a distribution, or of "Python"; None where it is not installed. Imports nothing."""
    if package == "Python":
        return platform.python_version()
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """(2, 7, 1) of "2.7.1.post2+cpu"; empty where it begins with no number."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def look(device: str | None = None) -> list[Finding]:
    """Compare the installed versions with the tables: one finding for each package of TABLE.

    Args:
        device: "npu", "cuda" or "cpu": whose tested sets come first where a nearest one is named.
    """
    return [judge(package, installed(package), device) for package in TABLE]


def judge(package: str, version: str | None, device: str | None = None) -> Finding:
    """The finding about one package of TABLE: bad where it is absent or known broken, warn where it was not run."""
    if version is None:
        return Finding(GROUP, package, "not installed", "bad", "pip install -c constraints.txt -e .")
    for broken in BROKEN:
        if broken.package == package and numbers(broken.since) <= numbers(version) < numbers(broken.below):
            change = f"does not work, since {broken.reason}; use {broken.instead}"
            return Finding(GROUP, package, version, "bad", change)
    field = TABLE[package]
    if any(numbers(version)[:2] == numbers(getattr(known, field))[:2] for known in TESTED):
        return Finding(GROUP, package, version)
    near = nearest(package, version, device)
    return Finding(GROUP, package, version, "warn", f"not among the versions that were run; the nearest set is {near}")


def nearest(package: str, version: str, device: str | None = None) -> VersionSet:
    """The tested set whose `package` is closest to `version`; sets of `device` before others."""
    wanted = (*numbers(version), 0, 0)[:2]

    def distance(known: VersionSet) -> tuple[int, int, bool]:
        own = (*numbers(getattr(known, TABLE[package])), 0, 0)[:2]
        return abs(own[0] - wanted[0]), abs(own[1] - wanted[1]), known.device != device

    return min(TESTED, key=distance)


def torch_npu_finding() -> Finding | None:
    """Whether torch_npu was made for the installed torch; None where torch_npu is not installed."""
    own, torch = installed("torch_npu"), installed("torch")
    if own is None:
        return None
    if torch is not None and numbers(own)[:3] != numbers(torch)[:3]:
        release = ".".join(map(str, numbers(own)[:3]))
        change = (
            f"was made for torch {release}, found torch {torch}: install torch {release}, or that torch's torch_npu"
        )
        return Finding(GROUP, "torch_npu", own, "bad", change)
    return Finding(GROUP, "torch_npu", own)


def check(device: str) -> None:
    """Before a run on `device`: refuse versions that are known not to work; the first rank warns of those that were
    not run.

    Raises:
        ConfigError: a version is known not to work, or a package is absent.
    """
    findings = look(device)
    wrong = [str(finding) for finding in findings if finding.level == "bad"]
    if wrong:
        raise ConfigError("versions that cannot be used:\n  " + "\n  ".join(wrong))
    if os.environ.get("RANK", "0") == "0":
        for finding in findings:
            if finding.level == "warn":
                logger.warning("%s", finding)
