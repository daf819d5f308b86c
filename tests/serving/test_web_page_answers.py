"""How the web page shows an answer: Markdown without HTML, boxes and points in every notation of the grounding data."""

import pytest

from mindspeed_mm.data.grounding.notation import NOTATIONS
from tests.helpers.web_page import add_image, answered_with, ask, no_sideways_scroll, playwright, until_answered

MARKDOWN = """# Title
Some **bold**, *slanted*, `code`, ~~gone~~, 2 * 3 * 4, snake_case_name, <script>alert(1)</script> <img src=x>
second line [link](https://example.com) ![image](https://example.com/a.png)

- one
  - inner
- two

3. third
4. fourth

> quoted

| name | number |
|---|---|
| **a** | 1 |

```python
def f(x):
    return "**x**"
```
42."""
COUNTS = {
    "h3": 1,
    "p > strong": 1,
    "em": 1,
    "p > code": 1,
    "del": 1,
    "ul": 2,
    "ul ul li": 1,
    "ol li": 2,
    "blockquote": 1,
    "td": 2,
    "td strong": 1,
    "pre code": 1,
    "script, img, a, b": 0,
}
BOXES, POINTS = [[[0.125, 0.25, 0.5, 0.875]], [[0.0, 0.5, 0.25, 1.0], [0.5, 0.0, 0.75, 0.125]]], [[[0.25, 0.625]]]

FRAMES = """() => [...document.querySelectorAll(".answers:last-child .drawn i")].map((frame) => {
  const share = (name) => parseFloat(frame.style[name]) / 100;
  const [left, top, width, height] = ["left", "top", "width", "height"].map(share);
  return frame.className === "point" ? [left, top] : [left, top, left + width, top + height];
})"""


def frames(page):
    """Boxes and points that are drawn on the last answer's image, as fractions of it."""
    playwright.expect(page.locator('.drawn i:not([style*="width"])')).to_have_count(0)
    return page.evaluate(FRAMES)


def test_markdown_is_shown_and_html_is_not_read(opened):
    _, page = opened
    answered_with(page, MARKDOWN)
    ask(page, "Hi")
    until_answered(page, 1)
    text = page.locator(".answer .text")
    assert {kind: text.locator(kind).count() for kind in COUNTS} == COUNTS
    shown = text.inner_text()
    assert "<script>alert(1)</script> <img src=x>\nsecond line [link](https://example.com)" in shown
    assert 'def f(x):\n    return "**x**"' in shown and shown.endswith("42.")
    assert text.locator("ol").get_attribute("start") == "3" and "2 * 3 * 4, snake_case_name" in shown
    assert page.locator(".facts").inner_text().startswith("7 tokens") and no_sideways_scroll(page)


def test_boxes_of_every_notation_are_drawn(opened):
    _, page = opened
    texts = {}
    for name, style in NOTATIONS.items():
        texts[name] = "A " + " and ".join(map(style.format, [*BOXES, *POINTS])) + "."
    answered_with(page, *texts.values())
    add_image(page)
    for number, (name, text) in enumerate(texts.items(), start=1):
        ask(page, name)
        until_answered(page, number)
        wanted = [entry for size in (4, 2) for group in NOTATIONS[name].parse(text, size) for entry in group]
        assert sorted(frames(page)) == [pytest.approx(entry, abs=1e-6) for entry in sorted(wanted)], name
        assert page.locator(".answers:last-child .chip").count() == 3


@pytest.mark.parametrize(
    ("text", "wanted", "names"),
    [
        ("<p>cat</p> {<10><20><30><40>}", [[0.1, 0.2, 0.3, 0.4]], ["cat"]),
        ("<ref>a dog</ref><box>[[1, 2, 3, 4]]</box>", [[0.001, 0.002, 0.003, 0.004]], ["a dog"]),
        # Tokenizers leave out marks that are special to them.
        ("The cat(100,200),(300,400) sits.", [[0.1, 0.2, 0.3, 0.4]], ["(100,200),(300,400)"]),
        ("The cat[[100, 200, 300, 400]]", [[0.1, 0.2, 0.3, 0.4]], ["[[100, 200, 300, 400]]"]),
        ("**[ .1, .2, .3, .4 ]**", [[0.1, 0.2, 0.3, 0.4]], ["[ .1, .2, .3, .4 ]"]),
        (
            "Between [0.5,0.1,0.2,0.9], (0.2, 0.8), [0,1], (1,2),(3), [[2000, 1, 3000, 2]] and {<101><1><102><2>}",
            [],
            [],
        ),
    ],
)
def test_what_is_a_box_and_whose(opened, text, wanted, names):
    _, page = opened
    answered_with(page, text)
    add_image(page)
    ask(page, "Where?")
    until_answered(page, 1)
    assert frames(page) == [pytest.approx(entry) for entry in wanted]
    assert [chip.inner_text().split("\n")[-1] for chip in page.locator(".chip").all()] == names


def test_boxes_that_count_from_a_padded_image(opened):
    _, page = opened
    answered_with(page, "[0.25,0.375,0.5,0.5]")
    add_image(page, 40, 20)  # in a square, its upper quarter and its lower one are padding
    page.click("#settings")
    page.check("#padded")
    ask(page, "Where?")
    until_answered(page, 1)
    assert frames(page) == [pytest.approx([0.25, 0.25, 0.5, 0.5])]
    page.uncheck("#padded")
    assert frames(page) == [pytest.approx([0.25, 0.375, 0.5, 0.5])]
