"""Answers of the engine in the forms of the protocol: one object, or chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from mindspeed_mm.generation.engine import GenerationResult
from mindspeed_mm.generation.text import REPLACEMENT
from mindspeed_mm.serving.engine_thread import AnswerEnd, TokenChance
from mindspeed_mm.serving.events import event


class ChatAnswer:
    """The parts that all objects of one answer share."""

    def __init__(self, model: str, *, logprobs: bool) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._model, self._logprobs, self._created = model, logprobs, int(time.time())

    def whole(self, end: AnswerEnd, tokens: Sequence[Sequence[TokenChance]]) -> dict[str, Any]:
        """The object of an answer that is not streamed; `tokens` of each sequence."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": sequence.text, "refusal": None},
                "logprobs": self._chances(tokens[index]),
                "finish_reason": sequence.finish_reason,
            }
            for index, sequence in enumerate(end.result.sequences)
        ]
        return self._object("chat.completion", choices) | {"usage": usage(end.result)}

    def chunk(
        self,
        index: int,
        delta: dict[str, Any],
        tokens: Sequence[TokenChance] = (),
        finish_reason: str | None = None,
    ) -> str:
        """An event of a stream for one choice."""
        chances = self._chances(tokens) if tokens else None
        choice = {"index": index, "delta": delta, "logprobs": chances, "finish_reason": finish_reason}
        return event(self._object("chat.completion.chunk", [choice]))

    def usage_chunk(self, result: GenerationResult) -> str:
        """The event with the counts, which has no choices."""
        return event(self._object("chat.completion.chunk", []) | {"usage": usage(result)})

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    def _chances(self, tokens: Sequence[TokenChance]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            _chance(token.text, token.logprob) | {"top_logprobs": [_chance(*other) for other in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def _chance(text: str, logprob: float) -> dict[str, Any]:
    """`bytes` is null for a token that is only a part of a character."""
    data = None if REPLACEMENT in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": data}


def usage(result: GenerationResult) -> dict[str, Any]:
    """Tokens of prompt (images included) and answers (their stop ids included)."""
    completion = sum(len(sequence.token_ids) for sequence in result.sequences)
    return {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": result.prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": result.cached_tokens},
    }
