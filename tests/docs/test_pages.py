"""What holds for every page: links lead somewhere, paths and flags exist, prose is narrow, the map names each page."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, inline_code, prose
from tests.docs.test_coming_from import FLAG, flags_of

WIDEST = 160
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:docs|scripts|examples|tests|benchmarks|mindspeed_mm|megatron|evaluation|\.ci)/[\w./-]+)`")
OURS = re.compile(r"`mindspeed-mm ([a-z-]+)([^`]*)`")
SCRIPT = re.compile(r"\b(python|python -m|bash) ((?:benchmarks|examples|scripts)[/.][\w./-]+\w)")
USAGE = re.compile(r"^(?:    |#   )((?:[A-Z_]+=\S+ )*(?:python|bash) .*(?:\\\n.*)*)$", re.MULTILINE)
"""A command in a docstring, or in the comment at the head of a shell script."""
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    found = set()
    for heading in HEADING.findall(page.read_text(encoding="utf-8")):
        plain = re.sub(r"[^\w\s-]", "", heading.lower())
        found.add(re.sub(r"\s", "-", plain.strip()))
    return found


def dead_links(page: str) -> list[str]:
    """Links of a page to files or headings that are not there."""
    found = []
    for link in LINK.findall(text_of(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_letter_r_links_hold(page):
    assert not dead_links(page)


@pytest.mark.parametrize("page", PAGES)
def test_letter_r_prose_is_narrow(page):
    wide = {number: len(line) for number, line in prose(page) if len(line) > WIDEST}
    assert not wide, f"{page}: lines of more than {WIDEST} columns: {wide}"


@pytest.mark.parametrize("page", PAGES)
def test_letter_r_named_paths_exist(page):
    assert not [path for path in PATH.findall(text_of(page)) if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_letter_r_flags_in_the_text_exist(page):
    wrong = []
    for command, rest in OURS.findall(text_of(page)):
        wrong += [flag for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", rest) if flag not in flags_of(command)]
    assert not wrong


@cache
def flags_of_script(path: Path) -> frozenset[str]:
    """The flags that a Python script adds to its parser; of a shell script those of what it starts, `train` if that is
    another launcher."""
    if path.suffix == ".sh":
        text = re.sub(r"(?m)^ *#.*$", "", path.read_text(encoding="utf-8"))
        module = re.search(r"python -m (examples[\w.]+)", text)
        command = re.search(r"-m mindspeed_mm ([a-z-]+)", text)
        return flags_of_script(_module(module[1])) if module else flags_of(command[1] if command else "train")
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    added = [call for call in calls if getattr(call.func, "attr", "") == "add_argument"]
    return frozenset(word.value for call in added for word in call.args if isinstance(word, ast.Constant))


def _module(name: str) -> Path:
    return ROOT / f"{name.replace('.', '/')}.py"


def wrong_script(command: str) -> str:
    """What is wrong with a command that names a script of ours; "" where nothing is, or where it names none."""
    found = SCRIPT.search(command)
    if found is None:
        return ""
    path = _module(found[2]) if found[1] == "python -m" else ROOT / found[2]
    if not path.is_file():
        return f"{found[2]} is not there"
    absent = sorted(set(FLAG.findall(command[found.end() :])) - flags_of_script(path))
    return f"{found[2]} has no {', '.join(absent)}" if absent else ""


@pytest.mark.parametrize("page", PAGES)
def test_letter_e_scripts_in_the_text_exist_with_their_flags(page):
    wrong = {line: wrong_script(code) for line, code in inline_code(page)}
    assert not {line: problem for line, problem in wrong.items() if problem}


def test_letter_e_scripts_in_docstrings_and_heads_exist_with_their_flags():
    wrong = {}
    for path in [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*/*.py"), *ROOT.glob("examples/*/*.sh")]:
        text = path.read_text(encoding="utf-8")
        head = text.split('"""')[1] if path.suffix == ".py" and text.startswith('"""') else text.split("\n\n")[0]
        wrong |= {f"{path.name}: {command}": wrong_script(command) for command in USAGE.findall(head)}
    assert len(wrong) > 30 and not {place: problem for place, problem in wrong.items() if problem}


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("python benchmarks/train.py --size tiny --no-such-flag", "benchmarks/train.py has no --no-such-flag"),
        ("python -m examples.otter.none --out x", "examples.otter.none is not there"),
        ("bash examples/quickstart/run.sh --seed 1", "examples/quickstart/run.sh has no --seed"),
        ("bash examples/llava1.5/pretrain_llava1_5.sh --train-iters 10", ""),
    ],
)
def test_a_wrong_script_is_noticed(command, problem):
    assert wrong_script(command) == problem


def test_letter_r_the_map_names_every_page():
    mapped = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in LINK.findall(text_of("docs/README.md"))}
    own = {"README.md", "README.zh.md", "docs/README.md"}
    missing = [page for page in PAGES if page not in own and (ROOT / page).resolve() not in mapped]
    assert not missing, f"give {missing} a line in a table of docs/README.md: | [Title](page.md) | what it is for |"
