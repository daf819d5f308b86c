"""docs/coming_from.md: each flag of ours that it names exists, and no suite is left out."""

import argparse
import re
from functools import cache

from mindspeed_mm.cli.main import build_parser, command_names
from tests.docs.pages import ROOT

PAGE = "docs/coming_from.md"
SUITES = ("MindSpeed-MM", "XTuner", "LLaVA", "LLaMA-Factory", "HA-DPO")
CODE = re.compile(r"`([^`]+)`")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


@cache
def flags_of(command: str) -> frozenset[str]:
    """The flags of `mindspeed-mm command`."""
    parser = build_parser(only=command.replace("-", "_"))
    (choices,) = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return frozenset(choices[command]._option_string_actions)


def wrong_flags(text: str) -> list[str]:
    """Flags that no command has, or not the command that stands before them; `train` where none does."""
    found = []
    for code in CODE.findall(text):
        named = re.search(r"mindspeed-mm ([a-z-]+)", code)
        command = named[1] if named else "train"
        if command.replace("-", "_") not in command_names():
            found.append(f"mindspeed-mm {command}")
            continue
        found += [f"{command} {flag}" for flag in FLAG.findall(code) if flag not in flags_of(command)]
    return found


def rows() -> list[tuple[str, list[str]]]:
    """(suite, cells) of every row of the page's tables."""
    found, suite = [], ""
    for line in (ROOT / PAGE).read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            suite = line.removeprefix("## ")
        elif line.startswith("| ") and not line.startswith("| there |"):
            found.append((suite, [cell.strip() for cell in line.strip("|").split(" | ")]))
    return found


def test_letter_r_flags_of_ours_exist():
    wrong = {there: wrong_flags(here) for _, (there, here, *_) in rows() if wrong_flags(here)}
    assert not wrong


def test_letter_r_every_suite_has_a_table_of_three_columns():
    assert {suite for suite, _ in rows()} == set(SUITES)
    assert not [cells for _, cells in rows() if len(cells) != 3]


def test_a_flag_that_is_not_there_is_noticed():
    assert wrong_flags("`--no-such-flag` and `mindspeed-mm infer --image`") == ["train --no-such-flag"]
    assert wrong_flags("`mindspeed-mm infer --lora-r 4`") == ["infer --lora-r"]
    assert wrong_flags("`mindspeed-mm fly`") == ["mindspeed-mm fly"]
