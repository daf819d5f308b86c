"""The site's navigation and links; .ci/run builds it strictly."""

import runpy

import pytest

from tests.docs.pages import PAGES, ROOT

SITE = runpy.run_path(str(ROOT / "scripts/site_pages.py"))


def test_letter_r_the_navigation_has_every_page():
    sections = SITE["navigation"]((ROOT / "docs/README.md").read_text(encoding="utf-8"))
    assert [name for section in sections for name in section] == ["Documentation", "Start", "Tasks", "Reference"]
    pages = [path for section in sections[1:] for entry in section.values() for each in entry for path in each.values()]
    wanted = [SITE["site_path"](page) for page in PAGES if SITE["site_path"](page)]
    assert sorted([*pages, "README.md"]) == sorted(wanted)


@pytest.mark.parametrize(
    ("page", "text", "wanted"),
    [
        ("docs/README.md", "[a](../examples/llava1.5/README.md#x)", "[a](examples/llava1.5/README.md#x)"),
        ("docs/zh/llava1.5.md", "[a](../data.md) [b](#c)", "[a](../data.md) [b](#c)"),
        ("examples/llava1.5/README.md", "[a](../../docs/data.md)", "[a](../../data.md)"),
        ("docs/performance.md", "![a](images/cost.png)", "![a](images/cost.png)"),
        ("docs/README.md", "[a](../tests/conftest.py) [b](https://c.d/e)", "a [b](https://c.d/e)"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(page, text, wanted):
    assert SITE["site_links"](text, page) == wanted


def test_letter_r_continuous_integration_builds_the_site():
    run = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "--quiet" not in run  # it hides the warnings from `--strict`, too
    assert "mkdocs build --strict" in run and "-c constraints.txt mkdocs-material" in run
