"""The addresses of a controller: the same API as a server's, in front of workers. Nothing here loads torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pydantic
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mindspeed_mm.serving.bodies import parse_body, read_body
from mindspeed_mm.serving.guard import token_refusal
from mindspeed_mm.serving.limits import ServingLimits
from mindspeed_mm.serving.page import PAGE
from mindspeed_mm.serving.protocol_app import protocol_app
from mindspeed_mm.serving.refusal import TIMED_OUT, UNAVAILABLE, RequestRefused
from mindspeed_mm.serving.relay import RequestRelay
from mindspeed_mm.serving.reload_relay import reload_everywhere
from mindspeed_mm.serving.worker_pool import HEARTBEAT_SECONDS, WorkerNotice, WorkerPool

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
KEPT_SECONDS = 30.0
"""Idle connections to workers. Less than the IDLE_SECONDS of a worker's server: one that closes as it is used again
looks like a loss."""
MORE_SECONDS = 10.0
"""A worker's own time-out answers first."""
NOTICE_BYTES = 2**16


class RoutedRequest(pydantic.BaseModel):
    """What the controller reads of a request; the worker checks the rest."""

    model_config = pydantic.ConfigDict(strict=True)

    model: str


class ChatController:
    """Passes chat completions on to workers."""

    def __init__(self, pool: WorkerPool, limits: ServingLimits, worker_token: str | None = None) -> None:
        """`worker_token`: what workers bear when they register, and what they are asked with; None: nothing."""
        self.pool, self.limits, self.worker_token = pool, limits, worker_token
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "mindspeed_mm_controller_requests", "Chat completions by status", ("status",), registry=self._registry
        )
        count = Gauge("mindspeed_mm_controller_workers", "Workers that are there", registry=self._registry)
        count.set_function(lambda: len(pool.workers()))
        running = Gauge("mindspeed_mm_controller_in_flight", "Requests that workers have", registry=self._registry)
        running.set_function(lambda: sum(worker.in_flight for worker in pool.workers()))
        headers = {} if worker_token is None else {"Authorization": f"Bearer {worker_token}"}
        self.client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(limits.seconds + MORE_SECONDS, connect=CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=KEPT_SECONDS),
            trust_env=False,  # workers are asked directly
        )

    async def chat(self, request: Request) -> Response:
        """Answer a request with a worker's answer. Raises as `RequestRelay.answer` does."""
        try:
            body = await self._body(request)
            model = parse_body(RoutedRequest, body).model
            response = await RequestRelay(self.pool, self.client, model, body).answer(request)
        except (RequestRefused, ClientDisconnect) as error:
            status = str(error.status) if isinstance(error, RequestRefused) else "client_gone"
            self._requests.labels(status).inc()
            raise
        self._requests.labels(str(response.status_code)).inc()
        return response

    async def reload(self, model: str) -> dict[str, Any]:
        """See `reload_everywhere`."""
        return await reload_everywhere(self.pool, self.client, model)

    async def _body(self, request: Request) -> bytes:
        try:
            return await asyncio.wait_for(read_body(request, self.limits.body_bytes), self.limits.seconds)
        except asyncio.TimeoutError as error:
            text = f"the request was not whole within {self.limits.seconds:g} seconds"
            raise RequestRefused(text, status=TIMED_OUT, code="timeout") from error

    async def notice(self, request: Request) -> WorkerNotice:
        """What a worker says. RequestRefused where it does not bear the token, or says it wrongly."""
        refusal = None if self.worker_token is None else token_refusal(request.headers, self.worker_token)
        if refusal is not None:
            raise refusal
        return parse_body(WorkerNotice, await read_body(request, NOTICE_BYTES))

    def metrics(self) -> bytes:
        """The answer to a scrape."""
        return generate_latest(self._registry)


def make_controller_app(
    controller: ChatController, *, token: str | None = None, loopback_only: bool = True, page: Path = PAGE
) -> FastAPI:
    """The ASGI application of a controller; the arguments are those of `protocol_app`."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with controller.client:
            yield

    pool = controller.pool

    def health() -> dict[str, Any]:
        workers = pool.workers()
        if not workers:
            raise RequestRefused("no worker is there", status=UNAVAILABLE)
        in_flight = sum(worker.in_flight for worker in workers)
        return {"status": "ok", "workers": len(workers), "models": pool.models(), "in_flight": in_flight}

    app = protocol_app(
        lifespan,
        chat=controller.chat,
        reload=controller.reload,
        models=pool.models,
        known=pool.known,
        health=health,
        metrics=controller.metrics,
        token=token,
        loopback_only=loopback_only,
        page=page,
    )
    _add_worker_addresses(app, controller)
    return app


def _add_worker_addresses(app: FastAPI, controller: ChatController) -> None:
    @app.post("/workers")
    async def hear(request: Request) -> dict[str, float]:
        notice = await controller.notice(request)
        if controller.pool.hear(notice):
            logger.info("the worker at %s is there with %s", notice.address, ", ".join(notice.models))
        return {"seconds": HEARTBEAT_SECONDS}

    @app.post("/workers/leave")
    async def leave(request: Request) -> dict[str, float]:
        notice = await controller.notice(request)
        controller.pool.leave(notice.address)
        logger.info("the worker at %s has left", notice.address)
        return {}
