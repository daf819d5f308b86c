"""Hooks of mkdocs: the navigation is docs/README.md's tables, and the examples' pages belong to the site.

Links of the pages are those of the repository, so that they hold where the files are read as they are. Here they are
turned into links of the site. A link to a file that is no page of the site becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAP = "docs/README.md"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
ROW = re.compile(r"^\| \[([^\]]+)\]\(([^)#\s]+)\) \|", re.MULTILINE)


def site_path(path: str) -> str | None:
    """Where a file of the repository lies in the site; None where it does not."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if re.fullmatch(r"examples/[\w.]+/README\.md", path) else None


def repository_path(uri: str) -> str:
    """The file of the repository that a page of the site is made of."""
    return uri if uri.startswith("examples/") else f"docs/{uri}"


def target_of(page: str, link: str) -> str:
    """The file that a relative link of the file `page` names."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def site_links(text: str, page: str) -> str:
    """The Markdown of the repository's file `page` with links of the site."""

    def turned(found: re.Match[str]) -> str:
        mark, label, link = found.groups()
        path, hash_mark, anchor = link.partition("#")
        if "://" in link or not path:
            return found[0]
        target = site_path(target_of(page, path))
        if target is None:
            return label
        own = posixpath.dirname(site_path(page) or "")
        return f"{mark}[{label}]({posixpath.relpath(target, own or '.')}{hash_mark}{anchor})"

    return LINK.sub(turned, text)


def navigation(text: str) -> list[dict]:
    """mkdocs' nav of the map's sections and their tables."""
    found: list[dict] = [{"Documentation": "README.md"}]
    for section in text.split("\n## ")[1:]:
        title = section.splitlines()[0]
        pages = [{name: site_path(target_of(MAP, link))} for name, link in ROW.findall(section)]
        if pages:
            found.append({title: pages})
    return found


def example_pages() -> list[str]:
    """The examples' README.md, as paths of the repository."""
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("examples/*/README.md"))


def on_config(config):
    """The navigation."""
    config.nav = navigation((ROOT / MAP).read_text(encoding="utf-8"))
    return config


def on_files(files, config):
    """The examples' pages."""
    from mkdocs.structure.files import File

    for path in example_pages():
        files.append(File.generated(config, path, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links of the site."""
    return site_links(markdown, repository_path(page.file.src_uri))
