"""The pages of the documentation: README, docs/ and the examples' own pages, with their blocks and commands."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [
        *ROOT.glob("README*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("README*.md"),
    ]
)

OPEN = re.compile(r"^( *)(```+|~~~+) *([^`\n]*)$")

INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """Every fenced block, indented ones too."""
    return blocks_of(page, (ROOT / page).read_text(encoding="utf-8"))


def blocks_of(page: str, text: str) -> list[Block]:
    """See `blocks`; `text` is the page's."""
    found = []
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        opened = OPEN.match(line)
        if opened:
            indent, fence, language = opened.groups()
            inside = []
            for _, each in lines:
                if each.strip() == fence:
                    break
                inside.append(each.removeprefix(indent))
            found.append(Block(page, number, language.strip(), "\n".join(inside)))
    return found


def unread_fences(text: str) -> list[int]:
    """Lines with a fence that `blocks_of` does not read: behind a bullet, a quotation mark, a tab, or never closed."""
    lines = iter(enumerate(text.splitlines(), 1))
    found = []
    for number, line in lines:
        opened = OPEN.match(line)
        if opened:
            closed = any(each.strip() == opened[2] for _, each in lines)
            found += [] if closed else [number]
        elif re.search(r"```|~~~", line):
            found.append(number)
    return found


def inline_code(page: str) -> list[tuple[int, str]]:
    """(line, code) of what stands between single backticks, also over the end of a line, outside of fenced blocks."""
    kept, fence = [], ""
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        opened = OPEN.match(line)
        inside = bool(fence or opened)
        if fence:
            fence = "" if line.strip() == fence else fence
        elif opened:
            fence = opened[2]
        kept.append("" if inside else line)
    text = "\n".join(kept)
    return [(text.count("\n", 0, code.start()) + 1, " ".join(code[1].split())) for code in INLINE.finditer(text)]


def prose(page: str) -> list[tuple[int, str]]:
    """(line, text) of what stands in no fenced block and in no table."""
    found, fence = [], ""
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        opened = OPEN.match(line)
        if fence:
            fence = "" if line.strip() == fence else fence
        elif opened:
            fence = opened[2]
        elif not line.lstrip().startswith("|"):
            found.append((number, line))
    return found


@dataclass(frozen=True)
class ShellCommand:
    """One command of a shell block."""

    place: str
    words: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()
    """What is set in front of it."""


def _logical_lines(text: str) -> list[str]:
    """Lines of a shell block; one that goes on behind a backslash, or within quotes, is one."""
    found, open_quote = [], False
    for line in text.replace("\\\n", " ").splitlines():
        found = [*found[:-1], f"{found[-1]}\n{line}"] if open_quote else [*found, line]
        try:
            shlex.split(found[-1], comments=True)
            open_quote = False
        except ValueError:
            open_quote = True
    return found


def commands(block: Block) -> list[ShellCommand]:
    """The commands of a shell block in their order; comments are left out."""
    found = []
    for line in _logical_lines(block.text):
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            part, words = words[:end], words[end + 1 :]
            variables = []
            while part and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", part[0], re.DOTALL):
                variables.append(tuple(part.pop(0).split("=", 1)))
            found.append(ShellCommand(block.place, tuple(part), tuple(variables)))
    return [command for command in found if command.words]
