"""What holds for every page: links lead somewhere, paths and flags exist, prose is narrow, the map names each page."""

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, prose
from tests.docs.test_coming_from import flags_of

WIDEST = 160
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:docs|scripts|examples|tests|benchmarks|mindspeed_mm|megatron|evaluation|\.ci)/[\w./-]+)`")
OURS = re.compile(r"`mindspeed-mm ([a-z-]+)([^`]*)`")
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


def test_letter_r_the_map_names_every_page():
    mapped = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in LINK.findall(text_of("docs/README.md"))}
    own = {"README.md", "README.zh.md", "docs/README.md"}
    missing = [page for page in PAGES if page not in own and (ROOT / page).resolve() not in mapped]
    assert not missing, f"give {missing} a line in a table of docs/README.md: | [Title](page.md) | what it is for |"
