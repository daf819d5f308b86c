"""A server of the OpenAI protocol without a model, whose times and errors are known."""

from __future__ import annotations

import asyncio
import json

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, StreamingResponse

STEP = 0.02
"""Seconds of the scripted server before each piece of text."""


def scripted_app(*, always: int | None = None):
    """Answers of four pieces; every fifth request fails, in one of four ways. `always`: all do, with this status."""
    app, seen = FastAPI(), []

    async def pieces(number):
        for text in ("", "one", " two", " three", " four"):
            await asyncio.sleep(STEP)
            yield f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\n"
        if number % 20 == 5:
            return
        if number % 20 == 10:
            yield f"data: {json.dumps({'error': {'code': 'worker_lost', 'message': 'gone'}})}\n\n"
        if number % 20 == 15:
            yield "data: nonsense\n\n"
        yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': 7, 'prompt_tokens': 11}})}\n\n"
        yield "data: [DONE]\n\n"

    @app.get("/v1/models")
    def models():
        return {"data": [] if always else [{"id": "scripted"}]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        seen.append(await request.json())
        number = len(seen)
        if always or number % 20 == 0:
            return JSONResponse({"error": {"message": "full"}}, always or 429)
        return StreamingResponse(pieces(number), media_type="text/event-stream")

    return app, seen
