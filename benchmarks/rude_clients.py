"""Many clients at once, some of them rude: what they ask, what must come of it, and servers in processes of their own.

Of the requests 5 % are malformed and 5 % leave: half of these before an answer, half in the middle of a stream. The
others are asked until they are answered, every fourth one as a stream, and their text is compared.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}

MALFORMED = (
    {"temperature": -1},
    {"messages": []},
    {"model": "other"},
    {"n": "many"},
    {"messages": [{"role": "robot", "content": "a"}]},
    {"response_format": {"type": "json_schema", "json_schema": {}}},
    {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}
        ]
    },
)
TEMPORARY = (429, 503)
"""Asked again after what Retry-After says."""


class RudeClients:
    """A number of clients that share a number of requests, and what came of them."""

    def __init__(
        self, address: str, asked: Sequence[dict], wanted: Sequence[str], *, clients: int, requests: int, seed: int = 0
    ) -> None:
        """`asked`: bodies of good requests, `wanted`: the texts that answer them."""
        self.address, self.asked, self.wanted = address, asked, wanted
        self.clients, self.requests, self.ended = clients, requests, 0
        self.kinds: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self._draw = random.Random(seed)

    def run(self, moments: Mapping[float, Callable[[], object]]) -> float:
        """Ask everything; each of `moments` is called when this share of the requests has ended. Returns seconds."""
        asking = threading.Thread(target=lambda: asyncio.run(self._all()))
        began = time.perf_counter()
        asking.start()
        for share, act in sorted(moments.items()):
            while asking.is_alive() and self.ended < share * self.requests:
                time.sleep(0.01)
            act()
        asking.join()
        return time.perf_counter() - began

    async def _all(self) -> None:
        left = iter(range(self.requests))
        async with httpx.AsyncClient(
            base_url=self.address, timeout=600, limits=httpx.Limits(max_connections=None), trust_env=False
        ) as client:

            async def work() -> None:
                for _ in left:
                    try:
                        await self._one(client)
                    except httpx.TransportError as error:
                        self._note("connection lost", False, repr(error))
                    self.ended += 1

            await asyncio.gather(*(work() for _ in range(self.clients)))

    async def _one(self, client: httpx.AsyncClient) -> None:
        number, chance = self._draw.randrange(len(self.asked)), self._draw.random()
        if chance < 0.05:
            await self._malformed(client, self.asked[number])
        elif chance < 0.1:
            await self._leave(client, self.asked[number])
        else:
            while not await self._answered(client, number):
                pass

    async def _malformed(self, client: httpx.AsyncClient, body: dict) -> None:
        data = json.dumps(body | self._draw.choice(MALFORMED)).encode()
        if self._draw.random() < 0.2:
            data = data[:-1]  # no JSON
        answer = await client.post(CHAT, content=data, headers=JSON)
        self._note("malformed", self._in_form(answer, (400, 404, *TEMPORARY)), answer.text)

    async def _leave(self, client: httpx.AsyncClient, body: dict) -> None:
        if self._draw.random() < 0.5:
            with contextlib.suppress(httpx.TimeoutException):
                await client.post(CHAT, json=body, timeout=self._draw.uniform(0.01, 0.5))
        else:
            async with client.stream("POST", CHAT, json=body | {"stream": True}) as answer:
                await anext(answer.aiter_lines(), None)
        self._note("left", True)

    async def _answered(self, client: httpx.AsyncClient, number: int) -> bool:
        """Ask once. False where the server asked to come again."""
        body = self.asked[number]
        if self._draw.random() < 0.25:
            answer = await client.post(CHAT, json=body | {"stream": True})
            text, lost = streamed_text(answer.text) if answer.status_code == httpx.codes.OK else (None, False)
            if lost:
                self._note("asked again after a lost stream", True)
                return False
        else:
            answer, text = await client.post(CHAT, json=body), None
            if answer.status_code == httpx.codes.OK:
                text = answer.json()["choices"][0]["message"]["content"]
        if answer.status_code in TEMPORARY:
            again = self._in_form(answer, TEMPORARY) and answer.headers.get("retry-after", "").isdigit()
            self._note(f"asked again after {answer.status_code}", again, answer.text)
            await asyncio.sleep(int(answer.headers.get("retry-after", "1")) * self._draw.uniform(0.2, 1.0))
            return False
        self._note("answered", text == self.wanted[number], answer.text)
        return True

    def _in_form(self, answer: httpx.Response, expected: tuple[int, ...]) -> bool:
        """Whether an error is one of the protocol."""
        with contextlib.suppress(ValueError):
            error = answer.json().get("error", {})
            return answer.status_code in expected and {"message", "type", "param", "code"} <= error.keys()
        return False

    def _note(self, kind: str, right: bool, text: str = "") -> None:
        self.kinds[kind] += 1
        if not right:
            self.faults.append(f"{kind}: {text[:300]}")


def streamed_text(events: str) -> tuple[str, bool]:
    """The text of a stream, and whether its worker was lost in the middle."""
    text = ""
    for event in events.split("\n\n"):
        data = event.removeprefix("data: ")
        if not data or data == "[DONE]":
            continue
        found = json.loads(data)
        if "error" in found:
            return text, found["error"]["code"] == "worker_lost"
        text += "".join(choice["delta"].get("content", "") for choice in found["choices"])
    return text, False


class ServerProcess:
    """A `mindspeed-mm serve` in a process of its own."""

    def __init__(self, *words: str) -> None:
        line = [sys.executable, "-m", "mindspeed_mm", "serve", *words]
        self.process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
        found = next(
            (found for text in self.process.stderr if (found := re.search(r"serving on (http://\S+)", text))), None
        )
        if found is None:
            raise RuntimeError(f"{line} ended with {self.process.wait()}")
        self.address = found[1]
        threading.Thread(target=collections.deque, args=(self.process.stderr, 0), daemon=True).start()

    def memory(self) -> float:
        """MiB that are resident."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024

    def end(self, number: int = signal.SIGTERM) -> None:
        """Send a signal and wait."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait()


class ServingProcesses:
    """A controller and two workers, one of which can be killed and started again."""

    def __init__(self, stack: contextlib.ExitStack, *worker: str) -> None:
        """`worker`: the words of a worker but for its controller's address."""
        self._stack = stack
        self.controller = self._start("controller", "--port", "0")
        self._words = ("worker", "--controller", self.controller.address, "--port", "0", *worker)
        self.staying, self._victim = self._start(*self._words), self._start(*self._words)
        self.until_there(2)

    def _start(self, *words: str) -> ServerProcess:
        found = ServerProcess(*words)
        self._stack.callback(found.end)
        return found

    def kill(self) -> None:
        """One worker ends without a word."""
        self._victim.end(signal.SIGKILL)

    def start_again(self) -> None:
        """A worker in place of the one that was killed."""
        self._victim = self._start(*self._words)

    def health(self) -> dict:
        """What the controller says of itself."""
        return httpx.get(f"{self.controller.address}/health").json()

    def until_there(self, workers: int) -> None:
        """Wait for so many workers."""
        while self.health().get("workers") != workers:
            time.sleep(0.2)

    def memory(self) -> dict[str, float]:
        """MiB of the processes that stay."""
        return {"controller": self.controller.memory(), "worker": self.staying.memory()}
