"""The server's web page in a headless browser."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest

import mindspeed_mm as mm
from tests.helpers.loopback import SteppedEngine, png, serving

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

PHONE = {"width": 390, "height": 780}


@contextlib.contextmanager
def open_site(golden):
    """(engines, address, browser); no step of the engine is taken before it is permitted."""
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH")
    from mindspeed_mm.serving.lanes import ModelLanes
    from mindspeed_mm.serving.limits import ServingLimits
    from mindspeed_mm.serving.service import ChatService

    engines = SteppedEngine(mm.load(golden / "models" / "llava_hf", device="cpu"))
    service = ChatService(ModelLanes("tiny", engines.make), ServingLimits(batch_size=1, new_tokens=40))
    with serving(service) as server, playwright.sync_playwright() as play:
        with play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser:
            try:
                yield engines, server.address, browser
            finally:
                engines.run()


@contextlib.contextmanager
def open_page(site, **options):
    """(engines, page) of a browser that knows nothing yet. Whatever the page complains about, or asks of another
    address, fails the test."""
    engines, address, browser = site
    context = browser.new_context(**{"viewport": PHONE, "locale": "en", "color_scheme": "light"} | options)
    page, faults, asked = context.new_page(), [], []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    playwright.expect(page.locator("#model")).to_have_value("tiny")
    yield engines, page
    context.close()
    assert not faults
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


def ask(page, text):
    """Type and send."""
    page.fill("#text", text)
    page.press("#text", "Enter")


def add_image(page, width=40, height=30):
    """An image for the next question, as the file dialog gives it."""
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": png(width, height)})
    page.wait_for_selector("#images img")


def answered_with(page, *texts):
    """From now on answers are these texts, the last one again and again; returns the bodies that are asked."""
    bodies = []

    def answer(route):
        text = texts[min(len(bodies), len(texts) - 1)]
        bodies.append(json.loads(route.request.post_data))
        chunks = [{"choices": [{"index": 0, "delta": {"content": text}}]}]
        chunks.append({"choices": [], "usage": {"completion_tokens": 7}})
        events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
        route.fulfill(content_type="text/event-stream", body=f"{events}data: [DONE]\n\n")

    page.route("**/v1/chat/completions", answer)
    return bodies


def until_answered(page, count):
    """Wait for so many whole answers."""
    playwright.expect(page.locator(".answer:not(.busy)")).to_have_count(count)


def no_sideways_scroll(page):
    """Whether all of the page is as wide as its window."""
    return page.evaluate(
        "document.documentElement.scrollWidth <= innerWidth && document.body.scrollWidth <= innerWidth"
    )
