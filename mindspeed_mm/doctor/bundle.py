"""A zip file for a bug report, from which names of people, hosts and places are taken out."""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import re
import socket
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import ConfigError

TOLD = re.compile(r"(ASCEND|HCCL|NCCL|GLOO|CUDA|TORCH|OMP|TASK_QUEUE|COMBINED|CPU_AFFINITY|MASTER_PORT|NPUS|NNODES)\w*")
"""Variables whose values are told; of others not even the name."""

SECRET = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)
ADDRESS = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b")
ADDRESS_6 = re.compile(r"(?<![\w:])[0-9a-fA-F]{1,4}:(?:[0-9a-fA-F]{0,4}:){2,6}[0-9a-fA-F]{0,4}(?:%\w+)?")
MAIL = re.compile(r"[\w.+-]+@[\w-]+\.[\w.]+")
BEARER = re.compile(r"((?:token|key|secret|password)[\"']?\s*[:=]\s*[\"']?)[^\s\"',]+", re.IGNORECASE)
LOG_BYTES = 2**20
"""Of each log its last part."""


class Redactor:
    """Takes out what names a person, a host or a place."""

    def __init__(self) -> None:
        home, user, host = str(Path.home()), getpass.getuser(), socket.gethostname()
        self._words = [(home, "HOME"), (host, "HOST"), (host.split(".")[0], "HOST")]
        if user != "root":
            self._words.append((user, "USER"))

    def __call__(self, text: str) -> str:
        """The text with home folder, user, host, addresses, mail addresses and secrets replaced by words for them."""
        for word, instead in self._words:
            if len(word) > 2:
                text = re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w-])", instead, text)
        text = BEARER.sub(r"\1REDACTED", text)
        text = MAIL.sub("MAIL", text)
        return ADDRESS_6.sub("ADDRESS", ADDRESS.sub("ADDRESS", text))


def write_bundle(
    path: Path, report: Mapping[str, Any], environment: Mapping[str, str], logs: Sequence[Path] = ()
) -> list[str]:
    """Write the zip file; the names of its members.

    Args:
        report: what --json prints.
        logs: text files whose last part is added, redacted as everything else.

    Raises:
        ConfigError: the file or a log cannot be written or read.
    """
    redact = Redactor()
    members = {
        "doctor.json": json.dumps(report, indent=1, ensure_ascii=False),
        "packages.txt": "\n".join(_packages()),
        "environment.txt": "\n".join(_variables(environment)),
    }
    try:
        for number, log in enumerate(logs):
            members[f"log_{number}_{log.name}"] = log.read_bytes()[-LOG_BYTES:].decode("utf-8", "replace")
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in members.items():
                archive.writestr(name, redact(text) + "\n")
    except OSError as error:
        raise ConfigError(f"--bundle {path}: {error.filename or path}: {error.strerror}: give another file") from error
    return list(members)


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write what --json prints, redacted. Raises ConfigError where that cannot be done."""
    try:
        path.write_text(Redactor()(json.dumps(report, indent=1, ensure_ascii=False)) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--report {path}: {error.strerror}: give another file") from error


def _packages() -> list[str]:
    found = {f"{item.metadata['Name']}=={item.version}" for item in importlib.metadata.distributions()}
    return sorted(found, key=str.lower)


def _variables(environment: Mapping[str, str]) -> list[str]:
    return [
        f"{name}={'REDACTED' if SECRET.search(name) else value}"
        for name, value in sorted(environment.items())
        if TOLD.fullmatch(name)
    ]
