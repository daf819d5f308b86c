"""A request's way from the controller to a worker, and the answer's way back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mindspeed_mm.serving.bodies import until_gone
from mindspeed_mm.serving.events import event
from mindspeed_mm.serving.refusal import TIMED_OUT, TOO_MANY, UNAVAILABLE, RequestRefused
from mindspeed_mm.serving.worker_pool import KnownWorker, WorkerPool, no_worker

logger = logging.getLogger(__name__)

MOST_TRIES = 3
"""Workers that one request is sent to: a request that brings workers down does not bring down all of them."""

BUSY = (TOO_MANY, UNAVAILABLE)
"""Answers of a worker after which another one is asked."""

KEPT = ("content-type", "retry-after", "cache-control", "x-accel-buffering")
"""Headers of a worker's answer that the client gets."""

DROPPED = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)
"""A connection that was there has ended."""

END = b"\n\n"
NOTHING = httpx.ByteStream(b"")


class RequestRelay:
    """One request: sent to workers until one answers."""

    def __init__(self, pool: WorkerPool, client: httpx.AsyncClient, model: str, body: bytes) -> None:
        self._pool, self._client, self._model, self._body = pool, client, model, body
        self._tried: list[KnownWorker] = []

    async def answer(self, request: Request) -> Response:
        """The response of a worker.

        Raises:
            RequestRefused: no worker answers.
            ClientDisconnect: nobody waits for one.
        """
        asking, gone = asyncio.create_task(self._ask()), asyncio.create_task(until_gone(request))
        try:
            await asyncio.wait({asking, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                raise ClientDisconnect()
            return asking.result()
        finally:
            for task in (asking, gone):
                task.cancel()

    async def _ask(self) -> Response:
        busy = None
        while len(self._tried) < MOST_TRIES:
            worker = self._pool.choose(self._model, self._tried)
            if worker is None:
                break
            self._tried.append(worker)
            try:
                response = await self._send(worker)
            except httpx.ReadTimeout as error:
                text = "the worker gave no answer in time"
                raise RequestRefused(text, status=TIMED_OUT, code="timeout") from error
            except httpx.TransportError as error:
                _lose(worker, error)
                continue
            if response.status_code not in BUSY:
                return response
            busy = response
        if busy is None:
            raise no_worker(self._model)
        return busy

    async def _send(self, worker: KnownWorker) -> Response:
        """A worker's answer: whole, or as a stream whose first event is there."""
        async with contextlib.AsyncExitStack() as stack:
            worker.in_flight += 1
            stack.callback(_count_down, worker)
            asked = self._client.build_request(
                "POST",
                f"{worker.notice.address}/v1/chat/completions",
                content=self._body,
                headers={"Content-Type": "application/json"},
            )
            answer = await self._begin(asked)
            stack.push_async_callback(_close, answer)
            headers = {name: answer.headers[name] for name in KEPT if name in answer.headers}
            if not headers.get("content-type", "").startswith("text/event-stream"):
                return Response(await answer.aread(), answer.status_code, headers=headers)
            events = _events(answer)
            first = await anext(events, b"")
            pieces = _stream(worker, first, events)
            return RelayedStream(stack.pop_all(), pieces, status_code=answer.status_code, headers=headers)

    async def _begin(self, asked: httpx.Request) -> httpx.Response:
        """The head of a worker's answer. Asked twice where the connection ends before it: a worker or a proxy that
        closed an idle connection as it was used again looks like one that is lost, and a new connection tells."""
        try:
            return await self._client.send(asked, stream=True)
        except DROPPED as error:
            logger.debug("%s: %s, on a new connection once more", asked.url, repr(error))
        return await self._client.send(asked, stream=True)


class RelayedStream(StreamingResponse):
    """A worker's stream; its end closes the connection to the worker, also where the client went before."""

    def __init__(self, held: contextlib.AsyncExitStack, pieces: AsyncIterator[bytes], **more) -> None:
        super().__init__(pieces, **more)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        async with self._held:
            await super().__call__(scope, receive, send)


async def _close(answer: httpx.Response) -> None:
    await answer.aclose()
    answer.stream = NOTHING  # which knew the answer: the circle would hold the request's images until it is collected


async def _events(answer: httpx.Response) -> AsyncIterator[bytes]:
    """Whole events: what is left of one when a worker is lost is not passed on."""
    rest = b""
    async for part in answer.aiter_bytes():
        *events, rest = (rest + part).split(END)
        for found in events:
            yield found + END


async def _stream(worker: KnownWorker, first: bytes, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        yield first
        async for found in events:
            yield found
    except httpx.TransportError as error:  # the client has a part of this answer: another worker's would not fit
        if not isinstance(error, httpx.TimeoutException):
            _lose(worker, error)
        text = "the worker was lost in the middle of the answer: ask again"
        yield event(RequestRefused(text, status=UNAVAILABLE, code="worker_lost").body()).encode()


def _lose(worker: KnownWorker, error: httpx.TransportError) -> None:
    # Its text alone: a handler that keeps records would keep the error's frames, and the request in them.
    logger.warning("the worker at %s is lost until it is heard again: %s", worker.notice.address, repr(error))
    worker.unreachable = True


def _count_down(worker: KnownWorker) -> None:
    worker.in_flight -= 1
