"""The addresses of a server."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from mindspeed_mm.serving.error_forms import add_error_forms
from mindspeed_mm.serving.guard import AccessGuard
from mindspeed_mm.serving.page import PAGE, add_page
from mindspeed_mm.serving.refusal import NOT_FOUND, UNAVAILABLE, RequestRefused
from mindspeed_mm.serving.service import ChatService

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def make_app(
    service: ChatService, *, token: str | None = None, loopback_only: bool = True, page: Path = PAGE
) -> FastAPI:
    """The ASGI application of a service, which it starts and ends.

    Args:
        token: what requests must bear; None: nothing.
        loopback_only: refuse requests whose Host header names another machine.
        page: folder of the web page.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.thread.start()
        try:
            yield
        finally:
            service.thread.close()

    app = FastAPI(title="mindspeed-mm", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(AccessGuard, token=token, loopback_only=loopback_only)
    add_error_forms(app)
    model = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "mindspeed-mm"}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await service.chat(request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != service.name:
            text = f"the model {name[:200]!r} does not exist; this server has {service.name!r}"
            raise RequestRefused(text, status=NOT_FOUND, param="model", code="model_not_found")
        return model

    @app.get("/health")
    async def health() -> dict[str, Any]:
        if not service.thread.alive:
            raise RequestRefused("the engine has stopped", status=UNAVAILABLE)
        return {"status": "ok", "model": service.name, "in_flight": service.in_flight}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": METRICS_TYPE})

    add_page(app, page)
    return app
