"""A server of the library on loopback, in a thread of the test."""

from __future__ import annotations

import base64
import contextlib
import io
import threading

from PIL import Image


@contextlib.contextmanager
def serving(service, **options):
    """A server with this service, which ends with the context."""
    from mindspeed_mm.serving.app import make_app

    with app_on_loopback(make_app(service, **options)) as server:
        yield server


@contextlib.contextmanager
def app_on_loopback(app):
    """A server of this application, which ends with the context."""
    from mindspeed_mm.serving.server import AddressServer, listen

    with listen("127.0.0.1", 0) as listening:
        server = AddressServer(app, listening, shutdown_seconds=10)
        thread = threading.Thread(target=server.serve_until_told)
        thread.start()
        try:
            assert server.ready.wait(60)
            yield server
        finally:
            server.should_exit = True
            thread.join(60)
    assert not thread.is_alive()


class SteppedEngine:
    """Makes engines of a model that take a step only when they are permitted to."""

    def __init__(self, vlm, batch_size: int = 1) -> None:
        self._vlm, self._batch_size = vlm, batch_size
        self.permits = threading.Semaphore(0)
        self.engines = []

    def make(self):
        """What ChatService calls."""
        engine = self._vlm.engine(batch_size=self._batch_size)
        step = engine.step

        def permitted() -> bool:
            self.permits.acquire()
            return step()

        engine.step = permitted
        self.engines.append(engine)
        return engine

    def run(self) -> None:
        """From now on steps are taken freely."""
        self.permits.release(1_000_000)


def png(width: int, height: int, color=(200, 30, 90)) -> bytes:
    """An encoded image of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes, kind: str = "png") -> str:
    """Bytes as the protocol takes them."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def asking(text: str, *images: bytes) -> list[dict]:
    """Messages of one question, its images in front."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(data)}} for data in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
