"""scripts/setup_env.sh against a pretended Python: what is missing is named, and the second run does nothing."""

import shutil
import subprocess
import sys

import pytest
from house import ROOT

TOOLS = ("bash", "dirname", "cat", "cksum", "rm", "mv", "mkdir", "sleep", "cp", "chmod")
# Answers as a Python would, notes every installation, and locks for real.
PYTHON = f"""#!/bin/bash
case "$*" in
    *fcntl*) exec {sys.executable} "$@" ;;
    *ensurepip*) exit "${{FAKE_VENV:-0}}" ;;
    *"-m venv"*)
        target="${{@: -1}}"
        mkdir -p "$target/bin"
        cp "$0" "$target/bin/python"
        echo made > "$target/pyvenv.cfg" ;;
    *"pip install"*) sleep 0.3; echo installed >> "$FAKE_LOG"; exit "${{FAKE_PIP:-0}}" ;;
    *version_info*) exit "${{FAKE_VERSION:-0}}" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout with the files that decide about the set-up, and a PATH with nothing but the tools."""
    root, programs = tmp_path / "checkout", tmp_path / "bin"
    (root / "scripts").mkdir(parents=True)
    programs.mkdir()
    for name in ("setup.py", "pyproject.toml", "constraints.txt", "scripts/setup_env.sh", "scripts/usage.sh"):
        shutil.copy(ROOT / name, root / name)
    for tool in TOOLS:
        (programs / tool).symlink_to(shutil.which(tool))
    return root


def add(checkout, name, text=PYTHON):
    program = checkout.parent / "bin" / name
    program.write_text(text)
    program.chmod(0o755)


def environment(checkout, **variables):
    return {"PATH": str(checkout.parent / "bin"), "FAKE_LOG": str(checkout.parent / "log"), **variables}


def set_up(checkout, **variables):
    return subprocess.run(
        ["bash", "scripts/setup_env.sh"],
        cwd=checkout,
        env=environment(checkout, **variables),
        capture_output=True,
        text=True,
    )


def installations(checkout):
    log = checkout.parent / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def complete(checkout):
    add(checkout, "python3.11")
    add(checkout, "cc", "#!/bin/bash\n")


def test_the_second_run_does_nothing(checkout):
    complete(checkout)
    first, second = set_up(checkout), set_up(checkout)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "done" in first.stderr and not first.stdout
    assert second.stderr == second.stdout == "" and installations(checkout) == 1


@pytest.mark.parametrize("name", ["setup.py", "constraints.txt", "pyproject.toml"])
def test_changed_requirements_install_again(checkout, name):
    complete(checkout)
    set_up(checkout)
    with (checkout / name).open("a") as stream:
        stream.write("# changed\n")
    assert set_up(checkout).returncode == 0 and installations(checkout) == 2


def test_two_runs_at_a_time_install_once(checkout):
    complete(checkout)
    command = ["bash", "scripts/setup_env.sh"]
    runs = [
        subprocess.Popen(command, cwd=checkout, env=environment(checkout), stderr=subprocess.DEVNULL) for _ in range(2)
    ]
    assert [run.wait(timeout=60) for run in runs] == [0, 0] and installations(checkout) == 1


def test_no_python_is_named(checkout):
    done = set_up(checkout)
    assert done.returncode == 1 and "no Python 3.10, 3.11 or 3.12 on PATH" in done.stderr


def test_an_unfit_python_is_passed_over(checkout):
    complete(checkout)
    done = set_up(checkout, FAKE_VERSION="1")
    assert done.returncode == 1 and "no Python 3.10" in done.stderr


def test_the_set_up_takes_no_arguments(checkout):
    words = ["bash", "scripts/setup_env.sh", "--fast"]
    done = subprocess.run(words, cwd=checkout, env=environment(checkout), capture_output=True, text=True)
    assert done.returncode == 1 and "found --fast; it takes no arguments" in done.stderr


def test_a_given_python_must_fit(checkout):
    complete(checkout)
    done = set_up(checkout, PYTHON="nowhere/python")
    assert done.returncode == 1 and "PYTHON=nowhere/python is not a working Python" in done.stderr


def test_a_missing_compiler_is_named(checkout):
    add(checkout, "python3.11")
    done = set_up(checkout)
    assert done.returncode == 1 and "no C compiler" in done.stderr


def test_a_python_without_venv_is_named(checkout):
    complete(checkout)
    done = set_up(checkout, FAKE_VENV="1")
    assert done.returncode == 1 and "has no venv or no pip" in done.stderr


def test_a_failed_installation_is_tried_again(checkout):
    complete(checkout)
    failed = set_up(checkout, FAKE_PIP="1")
    assert failed.returncode == 1 and "pip could not install" in failed.stderr
    assert set_up(checkout).returncode == 0 and installations(checkout) == 2


BEGIN_WITH_A_SET_UP = [
    path.relative_to(ROOT)
    for folder in ("examples", "scripts")
    for path in sorted((ROOT / folder).rglob("*.sh"))
    if "setup_env.sh" in path.read_text()
]


@pytest.mark.parametrize("name", BEGIN_WITH_A_SET_UP, ids=str)
def test_help_is_printed_before_anything_is_set_up(tmp_path, name):
    for each in (name, "scripts/usage.sh"):  # there is no other set-up
        (tmp_path / each).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / each, tmp_path / each)
    for word in ("-h", "--help"):
        done = subprocess.run(["bash", tmp_path / name, "--fast", word], capture_output=True, text=True)
        assert done.returncode == 0 and f"\n  bash {name}" in done.stdout, done.stderr
        assert "#" not in done.stdout and "set -euo" not in done.stdout
