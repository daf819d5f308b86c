"""docs/troubleshooting.md: every class of error is listed, and the tests that it names exist."""

import inspect
import re
import string

import pytest

from mindspeed_mm import errors
from tests.docs.pages import ROOT

PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
CLASSES = [
    name for name, value in vars(errors).items() if inspect.isclass(value) and value.__module__ == errors.__name__
]
LETTERS = string.ascii_uppercase[: string.ascii_uppercase.index("T") + 1]
NAMED = re.compile(r"\[(tests/[\w/]+\.py)\]\(\.\./\1\): ((?:`test_\w+`(?:, )?)+)")


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("name", CLASSES)
def test_letter_r_every_error_has_cause_and_cure(name):
    (row,) = [line for line in section("Kinds of errors").splitlines() if line.startswith(f"| `{name}` |")]
    _, cause, cure = row.strip("| ").split(" | ")
    assert cause and cure


def test_letter_r_no_error_is_invented():
    assert re.findall(r"^\| `(\w+)` \|", section("Kinds of errors"), re.MULTILINE) == CLASSES


def test_letter_r_every_letter_names_tests_that_exist():
    lines = [
        line
        for line in section("Faults that were found, and their tests").splitlines()
        if re.match(r"\| [A-Z] \|", line)
    ]
    assert [line[2] for line in lines] == list(LETTERS)
    for line in lines:
        named = NAMED.findall(line)
        assert named or "no test" in line, line
        for path, tests in named:
            assert f"test_letter_{line[2].lower()}_" in tests, line
            text = (ROOT / path).read_text(encoding="utf-8")
            assert not [test for test in re.findall(r"test_\w+", tests) if f"def {test}(" not in text], line
