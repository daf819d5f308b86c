"""A conversation about images, turn by turn. No terminal and no files here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image

from mindspeed_mm.constants import IMAGE_TOKEN
from mindspeed_mm.errors import TemplateError
from mindspeed_mm.generation.engine import GenerationEngine, GenerationHandle, GenerationRequest, GenerationResult
from mindspeed_mm.generation.options import GenerationOptions


class ChatSession:
    """Keeps the turns. Each question is asked with the whole conversation before it, in the training template."""

    def __init__(
        self,
        engine: GenerationEngine,
        options: GenerationOptions | Mapping[str, Any],
        *,
        max_context: int | None = None,
    ) -> None:
        """`max_context`: most tokens of a prompt and its answer. Where a conversation is longer, the model no longer
        sees its oldest turns: first of all those without an image. None: such a question is refused."""
        self._engine, self._max_context = engine, max_context
        self._asked = options
        self._options = options if isinstance(options, GenerationOptions) else engine.defaults.options(options)
        self.forgotten = 0
        """Turns that the model did not see when it answered the last question."""
        self.system: str | None = None
        self.turns: list[tuple[str, str]] = []
        """(question, answer) pairs; an image stands as IMAGE_TOKEN in front of the question it came with."""
        self.images: list[tuple[str, Image.Image]] = []
        """(name, image) of the whole conversation in reading order."""
        self.result: GenerationResult | None = None
        """Of the last question."""
        self._handle: GenerationHandle | None = None
        self._pending = 0

    def add_image(self, name: str, image: Image.Image) -> None:
        """Show an image with the next question."""
        self.images.append((name, image))
        self._pending += 1

    def reset(self) -> None:
        """Forget turns and images; the system text stays."""
        self.turns, self.images, self._pending = [], [], 0

    def set_system(self, text: str | None) -> None:
        """Start anew with a system text (None: the template's). Raises TemplateError where there is no place for it."""
        if text is not None and self._engine.template.with_system is None:
            raise TemplateError("this template has no place for a system text; choose another one with --template")
        self.system = text
        self.reset()

    def ask(self, question: str) -> Iterator[str]:
        """Pieces of the answer. The turn is kept once the answer is complete, or as far as it came when the iterator is
        closed or cancelled early; a question that fails (DataError, ConfigError) leaves the conversation as it was."""
        asked = f"{IMAGE_TOKEN}{self._engine.vlm.spec.family.after_image}" * self._pending + question
        handle = self._handle = self._engine.submit(self._request(asked), self._asked)
        try:
            yield from handle
        finally:
            handle.cancel()
            while handle.result is None and self._engine.step():
                pass
            self.result = handle.result
            if handle.error is None and handle.result is not None:  # None: a step was interrupted
                self.turns.append((asked, handle.result.text))
                self._pending = 0

    def _request(self, asked: str) -> GenerationRequest:
        """The question behind as many of the turns as fit."""
        turns, images = list(self.turns), [image for _, image in self.images]
        while True:
            pairs = (*turns, (asked, None))
            request = GenerationRequest("chat", turns=pairs, images=tuple(images), system=self.system)
            self.forgotten = len(self.turns) - len(turns)
            if not turns or self._fits(request):
                return request
            counts = [question.count(IMAGE_TOKEN) for question, _ in turns]
            number = counts.index(0) if 0 in counts else 0
            begin = sum(counts[:number])
            del turns[number], images[begin : begin + counts[number]]

    def _fits(self, request: GenerationRequest) -> bool:
        if self._max_context is None:
            return True
        return len(self._engine.prepare(request)) + self._options.max_new_tokens <= self._max_context

    def cancel(self) -> None:
        """End the answer that is being given; what was said is kept. May be called from a signal handler."""
        if self._handle is not None:
            self._handle.cancel()

    def as_record(self) -> dict[str, Any]:
        """The conversation as a LLaVA record."""
        conversations = [{"from": "system", "value": self.system}] if self.system is not None else []
        for question, answer in self.turns:
            conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        images = [name for name, _ in self.images[: len(self.images) - self._pending]]
        record: dict[str, Any] = {"id": "chat", "conversations": conversations}
        return record | ({"image": images[0] if len(images) == 1 else images} if images else {})
