"""One thread drives the engine for all requests; the server's event loop submits to it and hears from it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mindspeed_mm.errors import ContextError
from mindspeed_mm.generation.engine import GenerationEngine, GenerationHandle, GenerationRequest, GenerationResult
from mindspeed_mm.serving.limits import ServingLimits
from mindspeed_mm.serving.refusal import SERVER_ERROR, UNAVAILABLE, RequestRefused

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenChance:
    """A token of an answer with its log-probability."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    """(text, log-probability) of the likeliest ones at its place."""


@dataclass(frozen=True)
class AnswerPiece:
    """More of a sequence's text, and the tokens since the piece before where log-probabilities are asked for."""

    index: int
    text: str
    tokens: tuple[TokenChance, ...] = ()


@dataclass(frozen=True)
class AnswerEnd:
    """The end of a request: a result, or why there is none."""

    result: GenerationResult | None
    refusal: RequestRefused | None = None
    rest: tuple[tuple[TokenChance, ...], ...] = ()
    """The tokens of each sequence that no piece carried."""


class RunningRequest:
    """A request that the engine's thread has taken; `next` belongs to the event loop that submitted it."""

    def __init__(self, request: GenerationRequest, options: Mapping[str, Any]) -> None:
        self.request, self.options = request, dict(options)
        self.ended = False
        """Said by the engine's thread."""
        self.handle: GenerationHandle | None = None
        self.told: dict[int, int] = {}
        """Tokens of each sequence whose log-probabilities were sent."""
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[AnswerPiece | AnswerEnd] = asyncio.Queue()

    def send(self, event: AnswerPiece | AnswerEnd) -> None:
        """From the engine's thread."""
        if isinstance(event, AnswerEnd):
            if self.ended:
                return
            self.ended = True
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self) -> AnswerPiece | AnswerEnd:
        """The next event."""
        return await self._events.get()


class EngineThread:
    """Owns the engine. `submit`, `cancel` and `close` may be called from any thread."""

    def __init__(self, make_engine: Callable[[], GenerationEngine], limits: ServingLimits) -> None:
        """`make_engine` is called again where a step failed, which leaves an engine in no known state."""
        self._make_engine, self._limits = make_engine, limits
        self._engine = make_engine()
        self.after_image = self._engine.vlm.spec.family.after_image
        self._woken = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._requests: set[RunningRequest] = set()
        self._closing = False
        self._torch_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """True while requests are answered."""
        return self._thread.is_alive() and not self._closing

    def submit(self, request: GenerationRequest, options: Mapping[str, Any]) -> RunningRequest:
        """Hand a request to the engine, from an event loop. Options without max_new_tokens get what fits.

        Raises:
            RequestRefused: 503, the server ends.
        """
        with self._woken:
            if not self.alive:
                raise RequestRefused("the server is ending", status=UNAVAILABLE, retry_after=5)
            running = RunningRequest(request, options)
            self._requests.add(running)
            self._commands.append(lambda: self._begin(running))
            self._woken.notify()
        return running

    def cancel(self, running: RunningRequest) -> None:
        """End a request whose answer nobody waits for. One that has ended is left alone."""
        with self._woken:
            self._commands.append(lambda: self._cancel(running))
            self._woken.notify()

    def close(self, timeout: float | None = None) -> None:
        """Cancel what runs and end the thread."""
        with self._woken:
            self._closing = True
            self._woken.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        torch.set_num_threads(self._torch_threads)  # a new thread would begin with all that the machine has
        try:
            while self._turn():
                pass
            self._fail("the server is ending", UNAVAILABLE)
        except BaseException:
            self._closing = True
            self._fail("the engine has stopped", SERVER_ERROR)
            raise

    def _turn(self) -> bool:
        """Take what was submitted, and one step. False at the end."""
        with self._woken:
            while not (self._commands or self._closing or self._engine.busy):
                self._woken.wait()
            commands, self._commands = self._commands, []
            if self._closing:
                return False
        try:
            for command in commands:
                command()
            if self._engine.busy:
                self._engine.step()
        except RuntimeError:  # torch's: out of memory, a failed kernel
            logger.exception("a step of the engine failed; its requests are lost, a new engine goes on")
            self._fail("the engine failed at this request or one beside it", SERVER_ERROR)
            self._engine = self._make_engine()
        return True

    def _fail(self, message: str, status: int) -> None:
        with self._woken:
            lost, self._requests = self._requests, set()
        for running in lost:
            running.send(AnswerEnd(None, RequestRefused(message, status=status)))

    def _begin(self, running: RunningRequest) -> None:
        if running.ended:
            return
        try:
            options = self._with_room(running)
        except ValueError as error:
            self._end(running, AnswerEnd(None, refusal_of_engine(error)))
            return
        running.handle = self._engine.submit(
            running.request,
            options,
            on_text=lambda text, index: running.send(AnswerPiece(index, text, self._tokens(running, index))),
            on_end=lambda handle: self._finish(running, handle),
        )

    def _with_room(self, running: RunningRequest) -> dict[str, Any]:
        """The options with max_new_tokens: where the request does not say, all that context and limits leave."""
        if "max_new_tokens" in running.options:
            return running.options
        room = self._engine.max_length - len(self._engine.prepare(running.request))
        least = max(1, running.options.get("min_new_tokens", 0))  # without room, the engine says what is too long
        return running.options | {"max_new_tokens": max(least, min(self._limits.new_tokens, room))}

    def _tokens(self, running: RunningRequest, index: int) -> tuple[TokenChance, ...]:
        """Of a sequence, the tokens that were not told of yet, where the request asks for log-probabilities."""
        if running.options.get("logprobs") is None or running.handle is None:
            return ()
        found = running.handle.so_far(index)
        first = running.told.get(index, 0)
        running.told[index] = len(found.logprobs)
        pieces = self._pieces(found.token_ids, first)
        return tuple(
            TokenChance(
                piece,
                found.logprobs[place],
                tuple((self._pieces([*found.token_ids[:place], other], place)[0], chance) for other, chance in top),
            )
            for place, piece in enumerate(pieces, start=first)
            for top in [list(found.top_logprobs[place].items())]
        )

    def _pieces(self, ids: list[int], first: int) -> list[str]:
        """The text of each token from place `first` on, its space included."""
        tokenizer, found = self._engine.tokenizer, []
        for place in range(first, len(ids)):
            own = [token for token in ids[max(0, place - 1) : place + 1] if token < tokenizer.vocab_size]
            old = tokenizer.decode(own[:-1], skip_special_tokens=False)
            found.append(tokenizer.decode(own, skip_special_tokens=False)[len(old) :])
        return found

    def _finish(self, running: RunningRequest, handle: GenerationHandle) -> None:
        if handle.error is not None:
            self._end(running, AnswerEnd(None, refusal_of_engine(handle.error)))
            return
        rest = tuple(self._tokens(running, index) for index in range(len(handle.result.sequences)))
        self._end(running, AnswerEnd(handle.result, rest=rest))

    def _end(self, running: RunningRequest, event: AnswerEnd) -> None:
        with self._woken:
            self._requests.discard(running)
        running.send(event)

    def _cancel(self, running: RunningRequest) -> None:
        if running.handle is not None and not running.ended:
            running.handle.cancel()


def refusal_of_engine(error: ValueError) -> RequestRefused:
    """What the engine found wrong with a request, in the protocol's form."""
    if isinstance(error, RequestRefused):
        return error
    code = "context_length_exceeded" if isinstance(error, ContextError) else None
    return RequestRefused(str(error), param="messages", code=code)
