"""Errors of an application in the protocol's form."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from mindspeed_mm.serving.refusal import SERVER_ERROR, RequestRefused


def add_error_forms(app: FastAPI) -> None:
    """Every error has the protocol's form."""

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
