"""The web page in a headless browser: a conversation, its history, parameters, images, keys."""

import pytest

from tests.helpers.web_page import (
    add_image,
    answered_with,
    ask,
    no_sideways_scroll,
    open_page,
    playwright,
    until_answered,
)

DROP = """([name, size, colour, kind]) => {
  const canvas = Object.assign(document.createElement("canvas"), { width: size, height: size });
  canvas.getContext("2d").fillStyle = colour;
  return new Promise((done) => canvas.toBlob((blob) => {
    const data = new DataTransfer();
    data.items.add(new File([blob], name, { type: "image/png" }));
    const more = { bubbles: true, cancelable: true };
    const event = kind === "paste"
      ? new ClipboardEvent("paste", { ...more, clipboardData: data })
      : new DragEvent("drop", { ...more, dataTransfer: data });
    document.getElementById("text").dispatchEvent(event);
    done();
  }));
}"""


def test_an_answer_streams_stops_and_is_kept(opened):
    engines, page = opened
    add_image(page)
    ask(page, "What is it?")
    page.wait_for_selector(".answer.busy")
    engines.permits.release(12)
    playwright.expect(page.locator(".busy .text")).not_to_be_empty()
    page.press("body", "Escape")
    page.wait_for_selector(".answer:not(.busy)")
    assert "stopped" in page.inner_text(".answer .name")
    stopped = page.inner_text(".answer .text")

    page.reload()
    page.wait_for_selector(".answer")
    assert page.inner_text(".answer .text") == stopped and page.locator(".thumbs img").count() == 1
    assert no_sideways_scroll(page)

    playwright.expect(page.locator("#model")).to_have_value("tiny")
    engines.run()
    page.click("text=Regenerate")
    page.wait_for_selector(".answer:not(.busy)")
    assert page.locator(".answer .error").count() == 0 and "stopped" not in page.inner_text(".answer .name")


def test_boxes_are_drawn_and_text_stays_text(opened):
    _, page = opened
    bodies = answered_with(page, "<b>A cat</b> [0.25,0.1,0.5,0.9], not [0.5,0.1,0.2,0.9].")
    add_image(page, 40, 20)
    ask(page, "Where?")
    page.wait_for_selector('.drawn i[style*="width"]')
    assert page.locator(".drawn i").count() == 1
    image, frame = page.locator(".drawn img").bounding_box(), page.locator(".drawn i").bounding_box()
    assert frame["x"] - image["x"] == pytest.approx(image["width"] / 4, abs=1)
    assert frame["height"] == pytest.approx(image["height"] * 0.8, abs=1)
    assert page.inner_text(".answer .text").startswith("<b>A cat</b>")

    ask(page, "And now?")
    until_answered(page, 2)
    assert [message["role"] for message in bodies[-1]["messages"]] == ["user", "assistant", "user"]
    page.locator("text=Edit").first.click()
    assert page.input_value("#text") == "Where?" and page.locator("#images img").count() == 1


def test_parameters_are_sent_to_both_models(opened):
    _, page = opened
    bodies = answered_with(page, "Yes.")
    page.goto(f"{page.url}?model=tiny&second=tiny")
    playwright.expect(page.locator("#second")).to_have_value("tiny")
    page.select_option("#second", "")
    page.click("#settings")
    for name, value in {"temperature": "0", "top_p": "0.5", "max_tokens": "7", "seed": "3"}.items():
        page.fill(f"#{name}", value)
    page.select_option("#second", "tiny")
    page.click("#language")
    assert page.inner_text("#send") == "\u53d1\u9001"
    ask(page, "Hi")
    until_answered(page, 2)
    assert len(bodies) == 2
    expected = {"temperature": 0, "max_tokens": 7, "seed": 3, "model": "tiny", "stream": True}
    expected["stream_options"] = {"include_usage": True}
    assert bodies[0] == expected | {"messages": [{"role": "user", "content": "Hi"}]}
    page.click("#theme")
    assert page.get_attribute("html", "data-theme") == "dark" and no_sideways_scroll(page)


def test_a_token_is_asked_for_and_used(opened):
    _, page = opened
    asked = []

    def models(route):
        asked.append(route.request.headers.get("authorization"))
        if asked[-1] == "Bearer right":
            return route.fulfill(json={"data": [{"id": "other"}]})
        return route.fulfill(status=401, json={"error": {"message": "no"}})

    page.route("**/v1/models", models)
    page.click("#settings")
    page.fill("#token", "right")
    page.press("#token", "Tab")
    playwright.expect(page.locator("#model")).to_have_value("other")
    assert asked == ["Bearer right"]


def test_images_are_pasted_dropped_and_taken_away(opened):
    _, page = opened
    bodies = answered_with(page, "Two.")
    for number, kind in enumerate(("paste", "drop", "paste"), start=1):
        page.evaluate(DROP, [f"{number}.png", 10 * number, "red", kind])
        playwright.expect(page.locator("#images img")).to_have_count(number)
    page.locator("#images .icon").nth(1).click()
    playwright.expect(page.locator("#images img")).to_have_count(2)
    page.set_input_files("#file", {"name": "a.txt", "mimeType": "text/plain", "buffer": b"text"})
    assert page.inner_text("#notice") == "a.txt is not an image"
    ask(page, "How many?")
    until_answered(page, 1)
    parts = bodies[0]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]
    assert parts[0]["image_url"]["url"].startswith("data:image/png;base64,")
    page.locator(".thumbs .thumb").first.click()
    assert page.is_visible("#large img")
    page.keyboard.press("Escape")
    assert not page.is_visible("#large") and no_sideways_scroll(page)


def test_all_of_it_by_keyboard(opened):
    _, page = opened
    bodies = answered_with(page, "Yes.")
    page.keyboard.press("Alt+n")
    page.keyboard.type("First")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second")
    page.keyboard.press("Enter")
    until_answered(page, 1)
    assert bodies[0]["messages"] == [{"role": "user", "content": "First\nsecond"}]
    page.keyboard.press("Alt+n")
    page.locator(".examples button").nth(1).focus()
    page.keyboard.press("Enter")
    assert page.input_value("#text").startswith("Read the text")
    page.keyboard.press("Enter")
    until_answered(page, 1)
    assert page.locator("#history > div").count() == 2
    page.focus("#settings")
    page.keyboard.press("Enter")
    assert page.get_attribute("#settings", "aria-expanded") == "true"
    page.fill("#system", "Be brief.")
    ask(page, "Again")
    until_answered(page, 2)
    assert bodies[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
    nameless = "[...document.querySelectorAll('button, input, select, textarea')].filter((one) => one.checkVisibility()"
    nameless += " && !one.innerText && !one.getAttribute('aria-label') && !one.closest('label')).length"
    assert page.evaluate(nameless) == 0


def test_history_is_opened_and_deleted(opened):
    _, page = opened
    answered_with(page, "One.", "Two.")
    ask(page, "First question")
    until_answered(page, 1)
    page.keyboard.press("Alt+n")
    ask(page, "Second question")
    until_answered(page, 1)
    page.reload()
    playwright.expect(page.locator("#model")).to_have_value("tiny")
    assert page.inner_text(".bubble") == "Second question"
    page.click("#menu")
    page.click("text=First question")
    assert page.inner_text(".bubble") == "First question" and page.inner_text(".answer .text") == "One."
    page.click("#menu")
    page.locator("#history .now .icon").click()
    playwright.expect(page.locator("#history > div")).to_have_count(1)
    page.reload()
    playwright.expect(page.locator("#history > div")).to_have_count(1)
    assert page.inner_text(".bubble") == "Second question"


@pytest.mark.parametrize(("locale", "scheme"), [("zh-CN", "dark")])
def test_the_browsers_language_and_colours_are_taken(site, locale, scheme):
    with open_page(site, locale=locale, color_scheme=scheme, viewport={"width": 1280, "height": 800}) as (_, page):
        assert page.get_attribute("html", "data-theme") == scheme and page.get_attribute("html", "lang") == "zh-CN"
        assert page.inner_text("#send") == "\u53d1\u9001" and page.inner_text("#language") == "English"
        assert page.is_visible("#side") and not page.is_visible("#menu")
        page.click("#language")
        page.reload()
        playwright.expect(page.locator("#model")).to_have_value("tiny")
        assert page.inner_text("#send") == "Send" and page.text_content("#language").strip() == "\u4e2d\u6587"
