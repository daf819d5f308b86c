"""One model behind the chat completions of the protocol: admission, the wait for the engine, the answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mindspeed_mm.errors import ConfigError, WeightError
from mindspeed_mm.serving.answers import ChatAnswer
from mindspeed_mm.serving.bodies import parse_body, read_body, until_gone
from mindspeed_mm.serving.conversation import generation_request
from mindspeed_mm.serving.engine_thread import AnswerEnd, AnswerPiece, EngineThread, RunningRequest
from mindspeed_mm.serving.events import DONE, event
from mindspeed_mm.serving.lanes import ModelLanes
from mindspeed_mm.serving.limits import ServingLimits
from mindspeed_mm.serving.metrics import ServingMetrics
from mindspeed_mm.serving.protocol import ChatRequest, options_of
from mindspeed_mm.serving.ranks import RankChannel
from mindspeed_mm.serving.refusal import TIMED_OUT, TOO_MANY, RequestRefused, unknown_model

logger = logging.getLogger(__name__)

OK, CLIENT_GONE = "200", "client_gone"


class ChatService:
    """Answers chat completions with one model, and with it under its adapters."""

    def __init__(self, lanes: ModelLanes, limits: ServingLimits, channel: RankChannel | None = None) -> None:
        """`channel` as in EngineThread."""
        self.names, self.limits = lanes.names, limits
        self.known = f"this server has {', '.join(map(repr, self.names))}"
        self.thread = EngineThread(lanes, limits, channel)
        self.in_flight = 0
        """Requests between their arrival and the end of their answer."""
        self.metrics = ServingMetrics(lambda: self.in_flight)

    async def chat(self, request: Request) -> Response:
        """Answer a request, streamed or not.

        Raises:
            RequestRefused: why there is no answer.
            ClientDisconnect: nobody waits for one.
        """
        self._admit()
        exchange = Exchange(self, request)
        try:
            response = await exchange.answer()
        except BaseException as error:
            exchange.close(str(error.status) if isinstance(error, RequestRefused) else CLIENT_GONE)
            raise
        if not isinstance(response, AnswerStream):  # which closes the exchange itself
            exchange.close(OK)
        return response

    async def reload(self, model: str) -> None:
        """Read the adapter of a name again.

        Raises:
            RequestRefused: no adapter has that name, or it cannot be used; the one before stays.
        """
        if model not in self.names:
            raise unknown_model(model, self.known)
        try:
            await asyncio.wrap_future(self.thread.reload(model))
        except (ConfigError, WeightError) as error:
            raise RequestRefused(str(error), code="adapter_not_read") from error
        logger.info("the adapter %s was read again", model)

    def _admit(self) -> None:
        most = self.limits.batch_size + self.limits.queue
        if self.in_flight >= most:
            self.metrics.requests.labels(str(TOO_MANY)).inc()
            raise RequestRefused(
                f"{self.in_flight} requests wait or run, which is all that this server takes: ask again later",
                status=TOO_MANY,
                code="queue_full",
                retry_after=1,
            )
        self.in_flight += 1


class Exchange:
    """One request and its answer."""

    def __init__(self, service: ChatService, request: Request) -> None:
        self._service, self._request = service, request
        self._loop = asyncio.get_running_loop()
        self._arrived = self._loop.time()
        self._gone: asyncio.Task[None] | None = None
        self._running: RunningRequest | None = None
        self._chat: ChatRequest | None = None
        self._form: ChatAnswer | None = None
        self._has_text = self._closed = False

    async def answer(self) -> Response:
        """The response; raises as `ChatService.chat` does."""
        service, limits = self._service, self._service.limits
        body = await self._within(read_body(self._request, limits.body_bytes))
        chat = self._chat = parse_body(ChatRequest, body)
        if chat.model not in service.names:
            raise unknown_model(chat.model, service.known)
        options = options_of(
            chat,
            limits,
            vocabulary=service.thread.vocabulary,
            usual_temperature=service.thread.usual_temperature,
        )
        self._form = ChatAnswer(chat.model, logprobs=bool(chat.logprobs))
        asked = await asyncio.to_thread(
            generation_request, self._form.id, chat.messages, limits, after_image=service.thread.after_image
        )
        self._gone = asyncio.create_task(until_gone(self._request))
        self._running = service.thread.submit(chat.model, asked, options)
        # What is wrong with a request is known before its first piece of text, so that a stream has a status, too.
        first = await self._next()
        if chat.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return AnswerStream(self, self._stream(first), media_type="text/event-stream", headers=headers)
        return await self._whole(first)

    def close(self, status: str) -> None:
        """The end, whatever it is: what still runs for this request is ended."""
        if self._closed:
            return
        self._closed = True
        service = self._service
        service.in_flight -= 1
        service.metrics.requests.labels(status).inc()
        service.metrics.duration.observe(self._loop.time() - self._arrived)
        if self._gone is not None:
            self._gone.cancel()
        if self._running is not None:
            service.thread.cancel(self._running)

    def _left(self) -> float:
        return max(0.0, self._arrived + self._service.limits.seconds - self._loop.time())

    def _late(self) -> RequestRefused:
        seconds = self._service.limits.seconds
        return RequestRefused(f"no answer within {seconds:g} seconds", status=TIMED_OUT, code="timeout")

    async def _within(self, work):
        try:
            return await asyncio.wait_for(work, self._left())
        except asyncio.TimeoutError as error:
            raise self._late() from error

    async def _next(self) -> AnswerPiece | AnswerEnd:
        """The next event of the answer. Raises where the request fails, the client goes or time is over."""
        coming = asyncio.create_task(self._running.next())
        try:
            await asyncio.wait({coming, self._gone}, timeout=self._left(), return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                raise ClientDisconnect() if self._gone.done() else self._late()
        finally:
            coming.cancel()
        found = coming.result()
        if isinstance(found, AnswerEnd):
            if found.refusal is not None:
                raise found.refusal
            self._count(found)
        elif not self._has_text:
            self._has_text = True
            self._service.metrics.first_text.observe(self._loop.time() - self._arrived)
        return found

    def _count(self, end: AnswerEnd) -> None:
        metrics = self._service.metrics
        metrics.prompt_tokens.inc(end.result.prompt_tokens)
        metrics.cached_tokens.inc(end.result.cached_tokens)
        metrics.new_tokens.inc(sum(len(sequence.token_ids) for sequence in end.result.sequences))

    async def _whole(self, found: AnswerPiece | AnswerEnd) -> Response:
        tokens = [[] for _ in range(self._chat.n or 1)]
        while isinstance(found, AnswerPiece):
            tokens[found.index] += found.tokens
            found = await self._next()
        for own, rest in zip(tokens, found.rest, strict=True):
            own += rest
        return JSONResponse(self._form.whole(found, tokens))

    async def _stream(self, found: AnswerPiece | AnswerEnd) -> AsyncIterator[str]:
        status = CLIENT_GONE
        try:
            for index in range(self._chat.n or 1):
                yield self._form.chunk(index, {"role": "assistant", "content": ""})
            while isinstance(found, AnswerPiece):
                yield self._form.chunk(found.index, {"content": found.text}, found.tokens)
                found = await self._next()
            for index, sequence in enumerate(found.result.sequences):
                yield self._form.chunk(index, {}, found.rest[index], sequence.finish_reason)
            if self._chat.stream_options is not None and self._chat.stream_options.include_usage:
                yield self._form.usage_chunk(found.result)
            yield DONE
            status = OK
        except RequestRefused as refusal:  # the status was sent; the error is an event, as in the protocol
            status = str(refusal.status)
            yield event(refusal.body())
        except ClientDisconnect:
            logger.debug("%s: the client has gone", self._form.id)
        finally:
            self.close(status)


class AnswerStream(StreamingResponse):
    """The response of a streamed answer; its end is the exchange's, also where the client went before its start."""

    def __init__(self, exchange: Exchange, pieces: AsyncIterator[str], **more: Any) -> None:
        super().__init__(pieces, **more)
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.close(CLIENT_GONE)
