"""Commands, paths and flags that README and the guide name exist."""

import re
import shlex
import subprocess
import sys
from functools import cache

import pytest
from house import ROOT

DOCUMENTS = [
    path
    for path in ("README.md", "examples/llava1.5/README.md", "examples/quickstart/README.md")
    if (ROOT / path).exists()
]
BLOCK = re.compile(r"^```(?:bash|sh|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE_PATH = re.compile(
    r"`((?:docs|scripts|examples|tests|mindspeed_mm|megatron|checkpoint_converters|evaluation|\.ci)/[\w./-]+)`"
)
COMMAND = re.compile(r"mindspeed[-_]mm +([a-z][a-z-]*)")
# Programs that a block may start with besides our own.
FOREIGN = {
    "python",
    "python3",
    "python3.11",
    "pip",
    "source",
    "cd",
    "git",
    "export",
    "tail",
    "cat",
    "ls",
    "echo",
    "torchrun",
}


def commands(document: str) -> list[list[str]]:
    """The words of every command line in the document's shell blocks; output lines of consoles are left out."""
    found = []
    for block in BLOCK.findall((ROOT / document).read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.removeprefix("$ ").strip()
            if line and not line.startswith("#"):
                found += [words(part) for part in re.split(r"&&|\|\||;|\|", line)]
    return [command for command in found if command]


def words(line: str) -> list[str]:
    parts = shlex.split(line, comments=True)
    while parts and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", parts[0]):
        parts.pop(0)
    return parts


@cache
def help_of(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mindspeed_mm", *command, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{' '.join(command)} --help failed:\n{done.stderr}"
    return done.stdout


def our_command(command: list[str]) -> list[str] | None:
    """The words from the command of mindspeed-mm on, however it is started."""
    if command[0] == "mindspeed-mm":
        return command[1:]
    if "mindspeed_mm" in command and command[command.index("mindspeed_mm") - 1] == "-m":
        return command[command.index("mindspeed_mm") + 1 :]
    return None


@pytest.fixture(params=DOCUMENTS)
def document(request) -> str:
    return request.param


def test_readme_exists_to_be_checked():
    assert commands("README.md"), "README.md has no shell blocks"


def test_commands_start_with_something_known(document):
    unknown = {
        command[0]
        for command in commands(document)
        if command[0] not in FOREIGN | {"bash", "mindspeed-mm"} and not (ROOT / command[0]).exists()
    }
    assert not unknown


def test_scripts_exist(document):
    named = {word for command in commands(document) for word in command if word.endswith((".sh", ".py"))}
    assert not {name for name in named if not (ROOT / name).exists()}


def test_inline_paths_exist(document):
    named = set(INLINE_PATH.findall((ROOT / document).read_text(encoding="utf-8")))
    assert not {name for name in named if not (ROOT / name).exists()}


def test_subcommands_and_their_flags_exist(document):
    problems = []
    for command in commands(document):
        ours = our_command(command)
        if not ours or ours[0].startswith("-"):
            continue
        text = help_of(ours[0])
        flags = [word.split("=")[0] for word in ours[1:] if word.startswith("--")]
        problems += [f"{ours[0]} {flag}" for flag in flags if not re.search(rf"(?<!\S){flag}(?![\w-])", text)]
    assert not problems, problems


def test_flags_of_launchers_exist(document):
    """What is passed to a launcher of examples/llava1.5 goes on to its command."""
    problems = []
    for command in commands(document):
        script = next((word for word in command if re.fullmatch(r"examples/llava1\.5/\w+\.sh", word)), None)
        if script is None:
            continue
        kind = next(kind for kind in ("pretrain", "finetune", "inference", "evaluate") if kind in script)
        text = help_of({"pretrain": "train", "finetune": "train", "inference": "infer", "evaluate": "evaluate"}[kind])
        flags = [word.split("=")[0] for word in command if word.startswith("--")]
        problems += [f"{script} {flag}" for flag in flags if not re.search(rf"(?<!\S){flag}(?![\w-])", text)]
    assert not problems, problems
