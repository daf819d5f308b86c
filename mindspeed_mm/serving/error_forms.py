"""Errors of an application in the protocol's form."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mindspeed_mm.serving.events import event
from mindspeed_mm.serving.refusal import SERVER_ERROR, RequestRefused, server_ends


def add_error_forms(app: FastAPI) -> None:
    """Every error has the protocol's form."""
    app.add_middleware(EndingForm)

    @app.exception_handler(RequestRefused)
    async def refused(_: Request, error: RequestRefused) -> Response:
        return JSONResponse(error.body(), error.status, headers=error.headers())

    @app.exception_handler(HTTPException)
    async def of_the_framework(_: Request, error: HTTPException) -> Response:
        refusal = RequestRefused(str(error.detail), status=error.status_code)
        return JSONResponse(refusal.body(), refusal.status, headers=error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=HTTPStatus.BAD_REQUEST)  # nobody reads it

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> Response:
        refusal = RequestRefused("the server has a fault; its log says more", status=SERVER_ERROR)
        return JSONResponse(refusal.body(), refusal.status)


class EndingForm:
    """ASGI middleware: what the server gives up as it ends is answered in the protocol's form, too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        begun: Message | None = None

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = begun or message
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            refusal = server_ends()
            if begun is None:
                await JSONResponse(refusal.body(), refusal.status, headers=refusal.headers())(scope, receive, send)
            elif Headers(raw=begun["headers"]).get("content-type", "").startswith("text/event-stream"):
                await send({"type": "http.response.body", "body": event(refusal.body()).encode()})
