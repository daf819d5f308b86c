"""The addresses that a server and a controller share. Nothing here loads torch."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from mindspeed_mm.serving.bodies import read_body
from mindspeed_mm.serving.error_forms import add_error_forms
from mindspeed_mm.serving.guard import AccessGuard
from mindspeed_mm.serving.page import add_page
from mindspeed_mm.serving.refusal import unknown_model

RELOAD_BYTES = 2**10
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def protocol_app(
    lifespan: Callable[[FastAPI], Any],
    *,
    chat: Callable[[Request], Awaitable[Response]],
    reload: Callable[[str], Awaitable[dict[str, Any]]],
    models: Callable[[], Sequence[str]],
    known: Callable[[], str],
    health: Callable[[], dict[str, Any]],
    metrics: Callable[[], bytes],
    token: str | None,
    loopback_only: bool,
    page: Path,
) -> FastAPI:
    """An application with the protocol's addresses, /health, /metrics and the web page.

    Args:
        lifespan: what is there while it runs.
        chat: answers a chat completion.
        reload: has the adapter of a name read again, gives the answer; raises RequestRefused.
        models: names that requests may give; `known` says them in a refusal.
        health: the answer of /health; raises RequestRefused.
        metrics: the answer to a scrape.
        token: what requests must bear; None: nothing.
        loopback_only: refuse requests whose Host header names another machine.
        page: folder of the web page.
    """
    app = FastAPI(title="mindspeed-mm", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(AccessGuard, token=token, loopback_only=loopback_only)
    add_error_forms(app)

    @app.post("/v1/chat/completions")
    async def answer(request: Request) -> Response:
        return await chat(request)

    _add_models(app, models, known)

    @app.post("/v1/models/{name:path}/reload")
    async def read_again(name: str, request: Request) -> dict[str, Any]:
        await read_body(request, RELOAD_BYTES)  # of the type that no web page of another origin may send unasked
        return await reload(name)

    @app.get("/health")
    async def state() -> dict[str, Any]:
        return health()

    @app.get("/metrics")
    async def counts() -> Response:
        return Response(metrics(), headers={"Content-Type": METRICS_TYPE})

    add_page(app, page)
    return app


def _add_models(app: FastAPI, models: Callable[[], Sequence[str]], known: Callable[[], str]) -> None:
    """The addresses that list the models."""
    created = int(time.time())

    def model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "mindspeed-mm"}

    @app.get("/v1/models")
    async def all_models() -> dict[str, Any]:
        return {"object": "list", "data": [model(name) for name in models()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name not in models():
            raise unknown_model(name, known())
        return model(name)
