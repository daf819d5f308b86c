"""The web page in a headless browser."""

import json
import shutil

import pytest

import mindspeed_mm as mm
from tests.helpers.loopback import SteppedEngine, png, serving

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")

PHONE = {"width": 390, "height": 780}


@pytest.fixture(scope="module")
def site(golden):
    """(engines, address, browser); no step of the engine is taken before it is permitted."""
    from mindspeed_mm.serving.limits import ServingLimits
    from mindspeed_mm.serving.service import ChatService

    engines = SteppedEngine(mm.load(golden / "models" / "llava_hf", device="cpu"))
    service = ChatService("tiny", engines.make, ServingLimits(batch_size=1, new_tokens=40))
    with serving(service) as server, playwright.sync_playwright() as play:
        with play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser:
            try:
                yield engines, server.address, browser
            finally:
                engines.run()


@pytest.fixture
def opened(site):
    """(engines, page) of a browser that knows nothing yet; whatever the page complains about fails the test."""
    engines, address, browser = site
    context = browser.new_context(viewport=PHONE, locale="en", color_scheme="light")
    page = context.new_page()
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.goto(address)
    playwright.expect(page.locator("#model")).to_have_value("tiny")
    yield engines, page
    context.close()
    assert not faults


def ask(page, text):
    page.fill("#text", text)
    page.press("#text", "Enter")


def answered_with(page, text):
    """From now on every answer is this text; returns the bodies that are asked."""
    bodies = []

    def answer(route):
        bodies.append(json.loads(route.request.post_data))
        chunk = json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]})
        route.fulfill(content_type="text/event-stream", body=f"data: {chunk}\n\ndata: [DONE]\n\n")

    page.route("**/v1/chat/completions", answer)
    return bodies


def no_sideways_scroll(page):
    return page.evaluate(
        "document.documentElement.scrollWidth <= innerWidth && document.body.scrollWidth <= innerWidth"
    )


def test_an_answer_streams_stops_and_is_kept(opened):
    engines, page = opened
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": png(40, 30)})
    page.wait_for_selector("#images img")
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
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": png(40, 20)})
    page.wait_for_selector("#images img")
    ask(page, "Where?")
    page.wait_for_selector(".drawn i")
    assert page.locator(".drawn i").count() == 1
    image, frame = page.locator(".drawn img").bounding_box(), page.locator(".drawn i").bounding_box()
    assert frame["x"] - image["x"] == pytest.approx(image["width"] / 4, abs=1)
    assert frame["height"] == pytest.approx(image["height"] * 0.8, abs=1)
    assert page.inner_text(".answer .text").startswith("<b>A cat</b>")

    ask(page, "And now?")
    playwright.expect(page.locator(".answer:not(.busy)")).to_have_count(2)
    assert [message["role"] for message in bodies[-1]["messages"]] == ["user", "assistant", "user"]
    page.locator("text=Edit").first.click()
    assert page.input_value("#text") == "Where?" and page.locator("#images img").count() == 1


def test_parameters_are_sent_to_both_models(opened):
    _, page = opened
    bodies = answered_with(page, "Yes.")
    page.click("#settings")
    for name, value in {"temperature": "0", "top_p": "0.5", "max_tokens": "7", "seed": "3"}.items():
        page.fill(f"#{name}", value)
    page.select_option("#second", "tiny")
    page.click("#language")
    assert page.inner_text("#send") == "\u53d1\u9001"
    ask(page, "Hi")
    playwright.expect(page.locator(".answer:not(.busy)")).to_have_count(2)
    assert len(bodies) == 2
    expected = {"temperature": 0, "max_tokens": 7, "seed": 3, "model": "tiny", "stream": True}
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
