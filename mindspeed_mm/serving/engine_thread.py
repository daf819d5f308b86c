"""One thread drives the engine for all requests; the server's event loop submits to it and hears from it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mindspeed_mm.errors import ConfigError, ContextError, LostRankError, WeightError
from mindspeed_mm.generation.engine import GenerationHandle, GenerationRequest, GenerationResult
from mindspeed_mm.serving.lanes import BeginOrder, CancelOrder, ModelLanes, Order, ReloadOrder
from mindspeed_mm.serving.limits import ServingLimits
from mindspeed_mm.serving.ranks import BEAT_SECONDS, RankChannel, lost_rank
from mindspeed_mm.serving.refusal import SERVER_ERROR, RequestRefused, server_ends

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

    def __init__(self, order: BeginOrder) -> None:
        self.order = order
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


class Reading:
    """A wish to read an adapter again."""

    def __init__(self, order: ReloadOrder) -> None:
        self.order = order
        self.done: concurrent.futures.Future[None] = concurrent.futures.Future()


Command = RunningRequest | CancelOrder | Reading


class EngineThread:
    """Owns the engines. `submit`, `cancel`, `reload` and `close` may be called from any thread."""

    def __init__(self, lanes: ModelLanes, limits: ServingLimits, channel: RankChannel | None = None) -> None:
        """`channel`: to the other ranks of a model that is spread; they take the orders and steps of this thread."""
        self._lanes, self._limits, self._channel = lanes, limits, channel
        engine = lanes.engine(lanes.names[0])
        self._tokenizer, self.after_image = engine.tokenizer, engine.vlm.spec.family.after_image
        self.vocabulary: int = engine.vlm.spec.text_decoder.language_vocab_size
        """Ids of the model's tokens are below."""
        self.usual_temperature: float = engine.defaults.values.get("temperature", 1.0)
        """Of requests that do not say: the model file's, else the protocol's."""
        self.failure: BaseException | None = None
        """Why the thread has ended before it was told to."""
        self.on_failure: Callable[[], None] = lambda: None
        """Called from the thread when it fails."""
        self._numbers = itertools.count()
        self._woken = threading.Condition()
        self._commands: list[Command] = []
        self._requests: set[RunningRequest] = set()
        self._closing = False
        self._torch_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    @property
    def names(self) -> list[str]:
        """What requests may call the model."""
        return self._lanes.names

    @property
    def alive(self) -> bool:
        """True while requests are answered."""
        return self._thread.is_alive() and not self._closing

    def submit(self, model: str, request: GenerationRequest, options: Mapping[str, Any]) -> RunningRequest:
        """Hand a request to a model's engine, from an event loop. Options without max_new_tokens get what fits.

        Raises:
            RequestRefused: 503, the server ends.
        """
        with self._woken:
            if not self.alive:
                raise server_ends()
            running = RunningRequest(BeginOrder(next(self._numbers), model, request, dict(options)))
            self._requests.add(running)
            self._commands.append(running)
            self._woken.notify()
        return running

    def cancel(self, running: RunningRequest) -> None:
        """End a request whose answer nobody waits for. One that has ended is left alone."""
        with self._woken:
            self._commands.append(CancelOrder(running.order.number))
            self._woken.notify()

    def reload(self, model: str) -> concurrent.futures.Future[None]:
        """Read the adapter of a name again. Requests that run go on with the one that they began with. The future
        raises what ModelLanes.take does."""
        reading = Reading(ReloadOrder(model))
        with self._woken:
            if not self.alive:
                raise server_ends()
            self._commands.append(reading)
            self._woken.notify()
        return reading.done

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
            self._end_ranks()
            self._fail(server_ends())
        except BaseException as error:
            self._closing, self.failure = True, error
            self._fail(RequestRefused("the engine has stopped", status=SERVER_ERROR))
            self.on_failure()
            if not isinstance(error, LostRankError):  # which the caller tells
                raise

    def _end_ranks(self) -> None:
        if self._channel is None:
            return
        try:
            self._channel.end()
        except RuntimeError as error:  # one has ended before, which torchrun may have known first and told this one
            raise lost_rank(error) from error

    def _turn(self) -> bool:
        """Take what was submitted, and one step. False at the end."""
        with self._woken:
            if not (self._commands or self._closing or self._lanes.busy):
                self._woken.wait(None if self._channel is None else BEAT_SECONDS)
            commands, self._commands = self._commands, []
            if self._closing:
                return False
        try:
            orders = [(command, order) for command in commands if (order := self._order(command)) is not None]
            if self._channel is not None:
                self._channel.tell([order for _, order in orders], step=True)
            for command, order in orders:
                self._take(command, order)
            self._lanes.step()
        except RuntimeError as error:  # torch's: out of memory, a failed kernel, a lost rank
            if self._channel is not None:
                raise lost_rank(error) from error
            logger.exception("a step of the engine failed; its requests are lost, new engines go on")
            self._fail(RequestRefused("the engine failed at this request or one beside it", status=SERVER_ERROR))
            self._lanes.renew()
        return True

    def _fail(self, refusal: RequestRefused) -> None:
        with self._woken:
            lost, self._requests = self._requests, set()
            readings = [command for command in self._commands if isinstance(command, Reading)]
        for running in lost:
            running.send(AnswerEnd(None, refusal))
        for reading in readings:
            reading.done.set_exception(refusal)

    def _order(self, command: Command) -> Order | None:
        """What the engines are told; None where nothing is left to do, or the request is wrong."""
        if isinstance(command, Reading):
            return command.order
        if isinstance(command, CancelOrder):
            return command
        if command.ended:
            return None
        try:
            return dataclasses.replace(command.order, options=self._with_room(command.order))
        except ValueError as error:
            self._end(command, AnswerEnd(None, refusal_of_engine(error)))
            return None

    def _take(self, command: Command, order: Order) -> None:
        if isinstance(command, RunningRequest):
            command.handle = self._lanes.take(
                order,
                on_text=lambda text, index: command.send(AnswerPiece(index, text, self._tokens(command, index))),
                on_end=lambda handle: self._finish(command, handle),
            )
        elif isinstance(command, Reading):
            try:
                self._lanes.take(order)
            except (ConfigError, WeightError) as error:
                command.done.set_exception(error)
            else:
                command.done.set_result(None)
        else:
            self._lanes.take(order)

    def _with_room(self, order: BeginOrder) -> dict[str, Any]:
        """The options with max_new_tokens: where the request does not say, all that context and limits leave."""
        options = dict(order.options)
        if "max_new_tokens" in options:
            return options
        engine = self._lanes.engine(order.model)
        room = engine.max_length - len(engine.prepare(order.request))
        least = max(1, options.get("min_new_tokens", 0))  # without room, the engine says what is too long
        most = min(self._limits.new_tokens, engine.defaults.values.get("max_new_tokens", room), room)
        return options | {"max_new_tokens": max(least, most)}

    def _tokens(self, running: RunningRequest, index: int) -> tuple[TokenChance, ...]:
        """Of a sequence, the tokens that were not told of yet, where the request asks for log-probabilities."""
        if running.order.options.get("logprobs") is None or running.handle is None:
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
        tokenizer, found = self._tokenizer, []
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


def refusal_of_engine(error: ValueError) -> RequestRefused:
    """What the engine found wrong with a request, in the protocol's form."""
    if isinstance(error, RequestRefused):
        return error
    code = "context_length_exceeded" if isinstance(error, ContextError) else None
    return RequestRefused(str(error), param="messages", code=code)
