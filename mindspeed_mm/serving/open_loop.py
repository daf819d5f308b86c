"""Open-loop load on a server of the OpenAI protocol: requests arrive by a clock that does not wait for answers.

Arrivals are a Poisson process: the time between two is exponential with mean 1 / rate, drawn from a seed. Times of an
answer count from the request's arrival on that clock, so that a client that falls behind does not hide a wait.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from PIL import Image

from mindspeed_mm.errors import ConfigError

WORDS = "what does this image show and how many of them are there near the left side of it".split()

CONNECT_SECONDS = 10.0

KEPT_SECONDS = 2.0
"""Idle connections. Many servers close theirs after 5, and a request sent at that moment would count as lost."""


@dataclass(frozen=True)
class LoadPlan:
    """What is asked. Two runs with equal plans ask the same at the same times."""

    model: str
    requests: int = 100
    rate: float = 2.0
    """Arrivals a second, on average."""
    seed: int = 0
    images: int = 1
    """Of each request, each of its own random pixels."""
    image_side: int = 336
    """Pixels of a side."""
    question_words: int = 32
    """Of each question."""
    max_tokens: int = 64

    def arrivals(self) -> list[float]:
        """Seconds from the start at which requests arrive, ascending; the first one at 0."""
        draw, found = random.Random(self.seed), [0.0]
        while len(found) < self.requests:
            found.append(found[-1] + draw.expovariate(self.rate))
        return found

    def body(self, index: int) -> dict[str, Any]:
        """The body of a request."""
        draw = random.Random(f"{self.seed} {index}")
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": self._image(index, number)}} for number in range(self.images)
        ]
        parts.append({"type": "text", "text": " ".join(draw.choice(WORDS) for _ in range(self.question_words))})
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def _image(self, index: int, number: int) -> str:
        """A data URL of a smooth random image: as JPEG it has the size of a photograph, not of noise."""
        coarse = np.random.default_rng((self.seed, index, number)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        side = (self.image_side, self.image_side)
        Image.fromarray(coarse).resize(side, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


@dataclass
class LoadRecord:
    """What became of a request. Seconds count from its arrival, `arrival` itself from the start."""

    arrival: float
    late: float = 0.0
    """How much later than planned it was sent."""
    first_text: float | None = None
    end: float | None = None
    """When the answer was whole, or the error known."""
    prompt_tokens: int = 0
    new_tokens: int = 0
    """As the server counts them; without its count, pieces of text."""
    error: str | None = None
    """The kind of error (`429`, `stream: worker_lost`, `ReadTimeout`, ...)."""
    message: str | None = None
    pieces: list[float] = field(default_factory=list)
    """When each piece of text came."""


def first_model(address: str, token: str | None) -> str:
    """The first model that a server lists.

    Raises:
        ConfigError: there is no such server, or it lists none.
    """
    try:
        answer = httpx.get(f"{address}/models", headers=_bearer(token), timeout=CONNECT_SECONDS, trust_env=False)
        return str(answer.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(
            f"{address}/models lists no model ({error!r}): give the address of a server of the OpenAI protocol, or "
            "--model"
        ) from error


def run_load(
    address: str,
    plan: LoadPlan,
    *,
    token: str | None = None,
    timeout: float = 600.0,
    tell: Callable[[LoadRecord], None] = lambda record: None,
) -> list[LoadRecord]:
    """Ask a server, in the order of arrival.

    Args:
        address: http://HOST:PORT/v1 of the server; nothing else is asked.
        timeout: seconds without a byte after which a request has failed.
        tell: called as each request ends.
    """
    return asyncio.run(_run(address, plan, token, timeout, tell))


async def _run(
    address: str, plan: LoadPlan, token: str | None, timeout: float, tell: Callable[[LoadRecord], None]
) -> list[LoadRecord]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEPT_SECONDS)
    times = httpx.Timeout(timeout, connect=CONNECT_SECONDS, pool=None)
    bodies = [json.dumps(plan.body(index)).encode() for index in range(plan.requests)]  # not while the clock runs
    async with httpx.AsyncClient(headers=_bearer(token), timeout=times, limits=limits, trust_env=False) as client:
        start = time.perf_counter()

        async def ask(arrival: float, body: bytes) -> LoadRecord:
            await asyncio.sleep(max(0.0, start + arrival - time.perf_counter()))
            found = LoadRecord(arrival, late=time.perf_counter() - start - arrival)
            try:
                await _ask(client, f"{address}/chat/completions", body, found, start + arrival)
            except httpx.HTTPError as error:
                found.error, found.message = type(error).__name__, str(error)[:300]
            found.end = time.perf_counter() - start - arrival
            tell(found)
            return found

        return list(await asyncio.gather(*map(ask, plan.arrivals(), bodies)))


async def _ask(client: httpx.AsyncClient, url: str, body: bytes, found: LoadRecord, arrived: float) -> None:
    headers = {"Content-Type": "application/json"}
    async with client.stream("POST", url, content=body, headers=headers) as answer:
        if answer.status_code != httpx.codes.OK:
            found.error = str(answer.status_code)
            found.message = (await answer.aread()).decode(errors="replace")[:300]
            return
        done = False
        async for line in answer.aiter_lines():
            data = line.removeprefix("data:").strip()
            if not line.startswith("data:"):
                continue
            if data == "[DONE]":
                done = True
            else:
                _note(found, data, time.perf_counter() - arrived)
        if not done and found.error is None:
            found.error, found.message = "stream: cut off", "the stream ended without [DONE]"


def _note(found: LoadRecord, data: str, now: float) -> None:
    """What an event of a stream says."""
    try:
        chunk = json.loads(data)
        wrong = chunk.get("error")
        text = any(choice.get("delta", {}).get("content") for choice in chunk.get("choices", ()))
        usage = chunk.get("usage") or {}
    except (ValueError, AttributeError):
        found.error, found.message = "stream: no event", data[:300]
        return
    if wrong:
        code = wrong.get("code") if isinstance(wrong, dict) else None
        found.error, found.message = f"stream: {code or 'error'}", str(wrong)[:300]
    if text:
        found.first_text = now if found.first_text is None else found.first_text
        found.pieces.append(now)
    found.new_tokens = usage.get("completion_tokens") or max(found.new_tokens, len(found.pieces))
    found.prompt_tokens = usage.get("prompt_tokens") or found.prompt_tokens


def _bearer(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def good(records: Sequence[LoadRecord]) -> list[LoadRecord]:
    """Those that were answered."""
    return [record for record in records if record.error is None]
