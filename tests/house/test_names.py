"""One word for a thing, and one thing for a word."""

import ast
import re
from collections import defaultdict

import pytest
from house import ROOT, python_files, tree, where

EVERYWHERE = ("mindspeed_mm", "megatron", "checkpoint_converters", "evaluation", "examples", "benchmarks", "tests")
OLD_WORDS = re.compile(r"tower|picture", re.IGNORECASE)
FIXTURES = {"golden", "golden_eval", "golden_flamingo", "cases"}
# What public formats are called by (LLaVA's config, transformers' modules), and what users and data say.
PUBLIC = re.compile(
    r"vision_tower|in the picture|(description|depiction) of the picture|this picture shows"
    r"|Describe the picture|tree picture shows|A picture\."
    r'|"tower": spec,  # the key under which'
)


def test_class_names_are_unique():
    places = defaultdict(list)
    for path in python_files(*EVERYWHERE):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(where(path, node.lineno))
    assert not {name: found for name, found in places.items() if len(found) > 1}


def texts():
    for folder in (*EVERYWHERE, "docs"):
        for suffix in ("*.py", "*.md", "*.sh", "*.jinja"):
            yield from sorted(path for path in (ROOT / folder).rglob(suffix) if not FIXTURES & set(path.parts))
    yield ROOT / "README.md"


def test_one_word_per_thing():
    """vision_encoder and image, in names and in texts."""
    wrong = [
        f"{where(path, number)}: {line.strip()}"
        for path in texts()
        if path.name != "test_names.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if OLD_WORDS.search(PUBLIC.sub("", line))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["level", "one_row", "go_on", "divide", "LeanStep", "meet_empty_answers"])
def test_names_that_say_nothing_are_gone(name):
    """Names of functions and classes of the library."""
    wrong = []
    for path in python_files():
        for node in ast.walk(tree(path)):
            defined = getattr(node, "name", None) if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
            if defined == name:
                wrong.append(where(path, node.lineno))
    assert not wrong
