"""What the code never does: run a pickle, swallow an error, load leniently, print from the library."""

import ast
import re

import pytest
from house import ROOT, python_files, tree, where

EVERYWHERE = ("mindspeed_mm", "megatron", "checkpoint_converters", "evaluation", "examples", "tests")
TEXT_SUFFIXES = {".py", ".sh", ".toml", ".txt", ".md", ".yml", ".yaml", ".cfg"}
# Texts whose subject is another script: prompts and names that are data.
NOT_ASCII = {"tests", "evaluation/benchmarks", "mindspeed_mm/data/templates"}


def calls(path):
    """(line, dotted name, node) of every call with a plain name."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), node


def keyword(node: ast.Call, name: str):
    return next((item.value for item in node.keywords if item.arg == name), None)


def is_constant(node, value) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_torch_load_is_weights_only():
    wrong = [
        where(path, line)
        for path in python_files(*EVERYWHERE)
        for line, name, node in calls(path)
        if name == "torch.load" and not is_constant(keyword(node, "weights_only"), True)
    ]
    assert not wrong, wrong


def test_the_library_never_unpickles():
    unpicklers = {"pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "joblib.load", "dill.load"}
    wrong = [where(path, line) for path in python_files() for line, name, _ in calls(path) if name in unpicklers]
    assert not wrong, wrong


def test_weights_are_loaded_strictly():
    wrong = [
        where(path, line)
        for path in python_files()
        for line, name, node in calls(path)
        if name.endswith("load_state_dict") and is_constant(keyword(node, "strict"), False)
    ]
    assert not wrong, wrong


def test_no_error_is_swallowed():
    wrong = []
    for path in python_files():
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = ast.unparse(node.type) if node.type else "everything"
            reraises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            if caught in ("everything", "Exception", "BaseException") and not reraises:
                wrong.append(f"{where(path, node.lineno)} catches {caught}")
    assert not wrong, "\n".join(wrong)


def test_the_library_does_not_print():
    wrong = [where(path, line) for path in python_files() for line, name, _ in calls(path) if name == "print"]
    assert not wrong, wrong


def test_nothing_is_left_for_later():
    marks = re.compile(r"#.*\b(TODO|FIXME|XXX|HACK)\b")
    wrong = [
        where(path, number)
        for path in python_files("mindspeed_mm", "megatron", "checkpoint_converters", "evaluation", "examples")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if marks.search(line)
    ]
    assert not wrong, wrong


def source_texts():
    for folder in ("mindspeed_mm", "megatron", "checkpoint_converters", "evaluation", "examples", "scripts", ".ci"):
        for path in sorted((ROOT / folder).rglob("*")):
            relative = path.relative_to(ROOT).as_posix()
            data = any(relative.startswith(prefix) for prefix in NOT_ASCII)
            if path.is_file() and not data and (path.suffix in TEXT_SUFFIXES or path.parent.name == ".ci"):
                yield path
    yield from (ROOT / name for name in ("setup.py", "constraints.txt", "pyproject.toml"))


def test_sources_are_ascii():
    wrong = []
    for path in source_texts():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.isascii():
                wrong.append(where(path, number))
    assert not wrong, wrong


@pytest.mark.parametrize(
    "name",
    [
        *("scripts/setup_env.sh", "scripts/test.sh", ".ci/run"),
        *("examples/quickstart/run.sh", "examples/hallucination/digits.sh", "examples/grounding/digits.sh"),
    ],
)
def test_scripts_are_executable_and_strict(name):
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_mode & 0o111, f"chmod +x {name}"
    assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text
