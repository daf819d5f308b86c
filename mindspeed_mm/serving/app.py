"""The addresses of a server."""

from __future__ import annotations

import asyncio
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
            await asyncio.to_thread(service.thread.close)  # answers go out while its last step ends

    def health() -> dict[str, Any]:
        if not service.thread.alive:
            raise RequestRefused("the engine has stopped", status=UNAVAILABLE)
        return {"status": "ok", "model": service.names[0], "in_flight": service.in_flight}

    async def reload(name: str) -> dict[str, Any]:
        await service.reload(name)
        return {"id": name, "status": "reloaded"}

    return protocol_app(
        lifespan,
        chat=service.chat,
        reload=reload,
        models=lambda: service.names,
        known=lambda: service.known,
        health=health,
        metrics=service.metrics.text,
        token=token,
        loopback_only=loopback_only,
        page=page,
    )
