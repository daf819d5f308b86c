"""The launchers set the guide's variables, and take what mindspeed_mm.host.variables takes."""

import subprocess
from pathlib import Path

import pytest

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.host import variables

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "examples/llava1.5/ascend.sh"
TEXTS = (
    "0",
    "1",
    "2",
    "3",
    "4",
    "5",
    "8",
    "08",
    "119",
    "120",
    "7200",
    "7201",
    "0,1,2",
    "1,npu0:0-1",
    "",
    "-1",
    "x",
    "1.5",
)


def sourced(*names_and_texts, show=""):
    """What bash says when a launcher sources the file."""
    environment = {"PATH": "/usr/bin:/bin", **dict(names_and_texts)}
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source {SCRIPT}; {show}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("variable", variables.GUIDE, ids=lambda variable: variable.name)
def test_the_launchers_take_what_the_library_takes(variable):
    loop = " ".join(f"'{text}'" for text in TEXTS)
    show = (
        f'for text in {loop}; do if ({variable.name}="$text"; source {SCRIPT}) 2>/dev/null; then echo "$text"; fi; done'
    )
    taken = sourced(show=show).stdout.splitlines()
    assert [text for text in taken if text] == [text for text in TEXTS if variable.accepts(text)]


def test_what_is_wrong_is_said_and_nothing_starts():
    done = sourced(("HCCL_CONNECT_TIMEOUT", "60"), show="echo started")
    assert done.returncode == 1 and not done.stdout
    assert "error: HCCL_CONNECT_TIMEOUT=60: expected an integer in [120, 7200] s" in done.stderr


def test_defaults_are_the_ancestors_and_within_the_ranges():
    told = dict(line.split("=", 1) for line in sourced(show="env").stdout.splitlines() if "=" in line)
    names = ("ASCEND_SLOG_PRINT_TO_STDOUT", "ASCEND_GLOBAL_LOG_LEVEL", "TASK_QUEUE_ENABLE", "COMBINED_ENABLE")
    names += ("CPU_AFFINITY_CONF", "HCCL_CONNECT_TIMEOUT")
    assert [told[name] for name in names] == ["0", "3", "1", "1", "1", "1200"]
    variables.check(told)


@pytest.mark.parametrize("name", ["pretrain", "finetune", "inference", "evaluate"])
def test_every_launcher_sources_it(name):
    script = ROOT / "examples" / "llava1.5" / f"{name}_llava1_5.sh"
    assert f"source {SCRIPT}\n" in script.read_text(encoding="utf-8")
    done = subprocess.run(
        ["bash", str(script)], env={"PATH": "/usr/bin:/bin", "TASK_QUEUE_ENABLE": "7"}, capture_output=True, text=True
    )
    assert done.returncode == 1 and f"{script.name}: error: TASK_QUEUE_ENABLE=7: expected 0, 1 or 2" in done.stderr


def test_the_library_says_the_same():
    with pytest.raises(ConfigError, match="TASK_QUEUE_ENABLE '7': expected one of 0, 1, 2"):
        variables.check({"TASK_QUEUE_ENABLE": "7"})
