"""The addresses of a server."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from mindspeed_mm.serving.page import PAGE
from mindspeed_mm.serving.protocol_app import protocol_app
from mindspeed_mm.serving.refusal import UNAVAILABLE, RequestRefused
from mindspeed_mm.serving.service import ChatService


def make_app(
    service: ChatService, *, token: str | None = None, loopback_only: bool = True, page: Path = PAGE
) -> FastAPI:
    """The ASGI application of a service, which it starts and ends; the rest as in `protocol_app`."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.thread.start()
        try:
            yield
        finally:
            service.thread.close()

    def health() -> dict[str, Any]:
        if not service.thread.alive:
            raise RequestRefused("the engine has stopped", status=UNAVAILABLE)
        return {"status": "ok", "model": service.name, "in_flight": service.in_flight}

    return protocol_app(
        lifespan,
        chat=service.chat,
        models=lambda: [service.name],
        known=lambda: service.known,
        health=health,
        metrics=service.metrics.text,
        token=token,
        loopback_only=loopback_only,
        page=page,
    )
