"""Requests in, texts out: submit a request, stream its text, cancel it. No terminal and no files here.

A server drives the engine from one thread by calling `step` while `busy`, and submits from others; everybody else
just iterates a handle, which drives the engine for all requests in flight.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mindspeed_mm.data.media import ItemPlan, MediaProcessor
from mindspeed_mm.data.template import get_template
from mindspeed_mm.data.template_form import Template
from mindspeed_mm.data.tokenizer_base import Tokenizer
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.generation.beam import BeamJob
from mindspeed_mm.generation.decode import Decoder
from mindspeed_mm.generation.defaults import ModelDefaults
from mindspeed_mm.generation.images import ImageFeatures
from mindspeed_mm.generation.jobs import FinishReason, Generated, SampleJob
from mindspeed_mm.generation.options import GenerationOptions
from mindspeed_mm.generation.prompts import (
    GenerationRequest,
    expand,
    prompt_ids,
    prompt_positions,
    questions,
    stop_rules,
    with_image_ids,
)
from mindspeed_mm.generation.rules import AllowedTokens, PrefixAllowedTokens, bound, check_ids
from mindspeed_mm.generation.scheduler import Entry, Scheduler
from mindspeed_mm.generation.text import TextStream
from mindspeed_mm.models.vlm import VLM

AHEAD = 16
"""Requests of a list that wait per sequence that runs: enough to choose from, however long the list is."""

__all__ = ["GenerationEngine", "GenerationHandle", "GenerationRequest", "GenerationResult"]


@dataclass(frozen=True)
class GeneratedSequence:
    """One answer: `text` without stop marks, `token_ids` everything that was generated, the stop id included."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    score: float | None = None
    """Beam search's score."""
    logprobs: tuple[float, ...] = ()
    """Log-probability of each token, where the options ask for it."""
    top_logprobs: tuple[dict[int, float], ...] = ()
    """For each position the likeliest tokens' log-probabilities."""


@dataclass(frozen=True)
class GenerationResult:
    """The answer of a request, or why there is none."""

    id: str
    sequences: tuple[GeneratedSequence, ...] = ()
    """num_return_sequences answers, best first where they have scores."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt, those that were not computed, because another request had begun alike."""
    error: str | None = None

    @property
    def text(self) -> str:
        """Text of the first answer, "" where there is none."""
        return self.sequences[0].text if self.sequences else ""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Ids of the first answer."""
        return self.sequences[0].token_ids if self.sequences else ()


class GenerationHandle:
    """A request in flight. Iterate it for the pieces of its (first) answer's text: whole characters, never a part of a
    stop string; joined they are the result's text. A beam search's text comes at the end, in one piece."""

    def __init__(self, engine: GenerationEngine, request_id: str) -> None:
        self._engine, self.id = engine, request_id
        self._pieces: deque[str] = deque()
        self._entry: Entry | None = None
        self._sequences: Sequence[Generated] | None = None
        """Of a request that has ended. Its entry calls back to this handle, so it is let go then: what a request held,
        its images above all, is free at once and not when the garbage collector comes to the circle."""
        self.result: GenerationResult | None = None
        """Set at the end; `result.error` says why there is no answer."""
        self.error: ValueError | None = None

    def __iter__(self) -> Iterator[str]:
        """Raises the request's error (DataError, ConfigError) when it comes to it."""
        while True:
            while self._pieces:
                yield self._pieces.popleft()
            if self.result is not None:
                break
            if not self._engine.step() and self.result is None:
                raise RuntimeError(f"request {self.id} is lost: an earlier step of the engine was interrupted")
        if self.error is not None:
            raise self.error

    def wait(self) -> GenerationResult:
        """Run the engine until this request has ended. Raises the request's error."""
        for _ in self:
            pass
        return self.result

    def so_far(self, index: int) -> Generated:
        """What sequence `index` holds up to now. Read it in the thread that drives the engine: it goes on changing.

        Raises:
            ConfigError: the request was refused, so that there is none.
        """
        sequences = self._sequences if self._entry is None else self._entry.job.sequences
        if sequences is None:
            raise ConfigError(f"request {self.id} was refused and has no sequences: see its error")
        return sequences[index]

    def cancel(self) -> None:
        """End the request; what was generated so far becomes its result (finish_reason "cancelled")."""
        if self._entry is not None:
            self._entry.cancelled = True


class GenerationEngine:
    """Answers requests, in a batch that new ones join and finished ones leave.

    Images' features and the beginnings of prompts are remembered, so the weights must not change: make a new engine
    after training steps.
    """

    def __init__(
        self,
        vlm: VLM,
        tokenizer: Tokenizer,
        media: MediaProcessor | None,
        template: str | Template,
        *,
        batch_size: int = 16,
        image_token_id: int | None = None,
        defaults: ModelDefaults | None = None,
    ) -> None:
        """`batch_size` is the number of sequences that run together; `image_token_id` stands for image positions in
        the rules that look back at the prompt (None: -200, which is no token to them); `defaults` are what the
        model's own file says, below options that are given as a mapping."""
        self.vlm, self.tokenizer, self.media = vlm, tokenizer, media
        self.template, self.defaults = get_template(template, tokenizer), defaults or ModelDefaults()
        self._image_token_id = image_token_id
        self._decoder = Decoder(vlm)
        self.image_features = ImageFeatures(self._decoder, media)
        self._scheduler = Scheduler(self._decoder, self.image_features, batch_size)
        self._template_stops = stop_rules(self.template, tokenizer)
        self._lock = threading.RLock()

    @property
    def busy(self) -> bool:
        """True while any request waits or runs."""
        return self._scheduler.busy

    @property
    def max_length(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return self._decoder.max_length

    def submit(
        self,
        request: GenerationRequest,
        options: GenerationOptions | Mapping[str, Any] | None = None,
        *,
        on_text: Callable[[str, int], None] | None = None,
        on_end: Callable[[GenerationHandle], None] | None = None,
        allowed_tokens_fn: AllowedTokens | None = None,
    ) -> GenerationHandle:
        """Queue a request. Whatever is wrong with it or its options ends up in the handle, not here.

        Args:
            options: a mapping is checked as `generation_options` does, with the model's own defaults below; None:
                those alone, or greedy where there are none. GenerationOptions are taken as they are.
            on_text: called from `step` with each piece of text and the number of its sequence.
            on_end: called once when the request has ended.
            allowed_tokens_fn: called from `step` with the ids of prompt and answer [S] int64 before each token; gives
                the tokens that may follow. Every rank of a model that is spread must give the same.
        """
        handle = GenerationHandle(self, request.id)

        def end(error: ValueError | None) -> None:
            entry = handle._entry
            handle.error = _without_frames(error)
            result = self._result(request, entry, error)
            if entry is not None and isinstance(entry.job, BeamJob):  # which beams win is known now
                for index, sequence in enumerate(result.sequences):
                    text(sequence.text, index)
            if entry is not None:
                handle._sequences, handle._entry = entry.job.sequences, None
            handle.result = result
            if on_end is not None:
                on_end(handle)

        def text(piece: str, index: int) -> None:
            if index == 0:
                handle._pieces.append(piece)
            if on_text is not None:
                on_text(piece, index)

        try:
            entry = self._entry(request, options, text, end, allowed_tokens_fn)
        except (DataError, ConfigError) as error:
            end(error)
            return handle
        handle._entry = entry
        with self._lock:
            self._scheduler.submit(entry)
        return handle

    def step(self) -> bool:
        """Generate one token for every running request, after letting waiting ones in. Returns `busy`."""
        with self._lock:
            return self._scheduler.step()

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        options: GenerationOptions | Mapping[str, Any] | None = None,
        batch_size: int = 1,
        *,
        on_error: Literal["raise", "return"] = "raise",
        ordered: bool = True,
        prefix_allowed_tokens_fn: PrefixAllowedTokens | None = None,
    ) -> Iterator[GenerationResult]:
        """Yield one result for each request.

        Args:
            batch_size: sequences that run together, for this call.
            on_error: "raise" the first request's error, or "return" a result with `error` and go on.
            ordered: in the order of `requests`, or as they end.
            prefix_allowed_tokens_fn: called with the number of the request in the list and the ids of its prompt and
                answer [S] int64 before each token; gives the tokens that may follow, as transformers' does.
        """
        started: deque[GenerationHandle] = deque()
        ended: deque[GenerationHandle] = deque()
        in_flight: set[GenerationHandle] = set()
        before, self._scheduler.max_rows = self._scheduler.max_rows, batch_size
        ready, left = started if ordered else ended, deque(enumerate(requests))
        try:
            for _ in requests:
                while not ready or ready[0].result is None:
                    while left and self._scheduler.waiting < AHEAD * batch_size:
                        index, request = left.popleft()
                        allowed = bound(prefix_allowed_tokens_fn, index)
                        handle = self.submit(request, options, on_end=ended.append, allowed_tokens_fn=allowed)
                        in_flight.add(handle)
                        if ordered:
                            started.append(handle)
                    if not ready or ready[0].result is None:
                        self.step()
                handle = ready.popleft()
                in_flight.discard(handle)
                if handle.error is not None and on_error == "raise":
                    raise _naming(handle) if len(requests) > 1 else handle.error
                yield handle.result
        finally:
            for handle in in_flight:
                handle.cancel()
            self._scheduler.max_rows = before

    def prepare(self, request: GenerationRequest) -> list[int]:
        """Expanded prompt ids of a request. Raises as `prompts.prompt_ids` does, and ImageError where the size of an
        image decides and cannot be read."""
        return self._prepare(request, self._plans(self._images(request)))

    def _images(self, request: GenerationRequest) -> Sequence[Any]:
        """The images of a request, found already where their sizes decide how long the prompt is, or where the model's
        projector reads the question about them."""
        media = self.image_features.media
        if media is not None and media.reads_instructions and request.images:
            return self.image_features.find(request.images, [media.instruction(text) for text in questions(request)])
        return request.images if self.image_features.fixed else self.image_features.find(request.images)

    def _plans(self, images: Sequence[Any]) -> list[ItemPlan]:
        fixed = self.image_features.fixed
        return [fixed] * len(images) if fixed else [image.plan for image in images]

    def _prepare(self, request: GenerationRequest, plans: Sequence[ItemPlan]) -> list[int]:
        after = self.vlm.spec.family.after_image
        ids = expand(prompt_ids(request, self.tokenizer, self.template, after_image=after), plans)
        size = self.vlm.spec.text_decoder.language_vocab_size
        if ids and max(ids) >= size:
            raise DataError(
                f"request {request.id}: the tokenizer gives id {max(ids)}, the model has {size}: use the tokenizer "
                "that belongs to the weights"
            )
        return ids

    def _entry(self, request, options, text, end, allowed) -> Entry:
        given = options if options is not None else {}
        if not isinstance(options, GenerationOptions):
            options = self.defaults.options(given)
        check_ids(options, self.vlm.spec.text_decoder.language_vocab_size)
        images = self._images(request)
        plans = self._plans(images)
        prompt = self._prepare(request, plans)
        positions = prompt_positions(self.vlm.spec, prompt, plans)
        options = self.defaults.fitting(options, given, self.max_length - len(prompt))
        self._decoder.check_length(len(prompt), options.max_new_tokens)
        ids, texts = self._template_stops
        stop_ids = (*(options.eos_token_ids or self.tokenizer.end_ids), *ids)
        history = with_image_ids(prompt, self._image_token_id)
        streams = [TextStream(self.tokenizer, (*texts, *options.stops)) for _ in range(options.num_return_sequences)]
        if options.num_beams > 1:
            job = BeamJob(history, options, stop_ids, streams[0], allowed)
        else:
            job = SampleJob(history, options, stop_ids, streams, text, allowed)
        length = len(prompt) + options.max_new_tokens
        return Entry(job, prompt, length, images, end, str(request.id), positions=positions)

    def _result(self, request: GenerationRequest, entry: Entry | None, error: ValueError | None) -> GenerationResult:
        if error is not None or entry is None:
            return GenerationResult(request.id, error=str(error))
        sequences = tuple(map(_sequence, entry.job.sequences))
        return GenerationResult(request.id, sequences, len(entry.prompt), entry.start)


def _without_frames(error: ValueError | None) -> ValueError | None:
    """An error and its causes without the frames they came through, which hold the request."""
    found: BaseException | None = error
    while found is not None:
        found.__traceback__ = None
        found = found.__cause__ or found.__context__
    return error


def _naming(handle: GenerationHandle) -> ValueError:
    """The error of one of several requests, which names it, caused by the error as it was."""
    error, name = handle.error, f"request {handle.id}: "
    if not isinstance(error, ConfigError | DataError) or str(error).startswith(name):
        return error
    named = type(error)(f"{name}{error}")
    named.__cause__ = error
    return named


def _sequence(found: Generated) -> GeneratedSequence:
    return GeneratedSequence(
        found.stream.text,
        tuple(found.token_ids),
        found.finish_reason,
        found.score,
        tuple(found.logprobs),
        tuple(found.top_logprobs),
    )
