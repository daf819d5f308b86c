"""The workers that a controller knows: who is there, and whose queue is the shortest."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Annotated
from urllib.parse import urlsplit

import pydantic

from mindspeed_mm.serving.refusal import UNAVAILABLE, RequestRefused, unknown_model

HEARTBEAT_SECONDS = 5.0
"""How often a worker tells that it is there."""

LOST_AFTER = 3 * HEARTBEAT_SECONDS
"""A worker that says nothing for so long gets no requests."""

FORGOTTEN_AFTER = 3600.0
"""A lost worker is kept for so long: until then its models are away for a while (503), not unknown (404)."""

Name = Annotated[str, pydantic.Field(min_length=1, max_length=200)]


class WorkerNotice(pydantic.BaseModel):
    """What a worker says of itself; its registration and its heartbeat alike."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    address: Annotated[str, pydantic.Field(max_length=500)]
    """http://HOST:PORT"""
    models: Annotated[list[Name], pydantic.Field(min_length=1, max_length=64)]
    capacity: pydantic.PositiveInt
    """Sequences that run together."""

    @pydantic.field_validator("address")
    @classmethod
    def _is_a_server(cls, value: str) -> str:
        wrong = ValueError(f"found {value[:100]!r}; expected http://HOST:PORT")
        try:
            parts = urlsplit(value)
            known = parts.scheme in ("http", "https") and parts.hostname and parts.port
        except ValueError as error:
            raise wrong from error
        if not known or value != f"{parts.scheme}://{parts.netloc}" or "@" in parts.netloc:
            raise wrong
        return value


class KnownWorker:
    """A worker and what the controller has sent to it."""

    def __init__(self, notice: WorkerNotice, now: float) -> None:
        self.notice, self.heard = notice, now
        self.in_flight = 0
        self.taken = 0
        """When it last got a request, counted in requests: of equal queues the one that waited longest is next."""
        self.unreachable = False
        """A connection to it broke since it was last heard."""


class WorkerPool:
    """The workers of one controller."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds that only grow."""
        self._clock = clock
        self._workers: dict[str, KnownWorker] = {}
        self._requests = 0

    def hear(self, notice: WorkerNotice) -> bool:
        """A worker says that it is there. True where it was not, or was lost."""
        now = self._clock()
        for address, worker in list(self._workers.items()):
            if now - worker.heard > FORGOTTEN_AFTER and not worker.in_flight:
                del self._workers[address]
        worker = self._workers.get(notice.address)
        if worker is None:
            self._workers[notice.address] = KnownWorker(notice, now)
            return True
        returned = not self.is_there(worker)
        worker.notice, worker.heard, worker.unreachable = notice, now, False
        return returned

    def leave(self, address: str) -> None:
        """A worker says that it goes; what it still answers goes on."""
        self._workers.pop(address, None)

    def is_there(self, worker: KnownWorker) -> bool:
        """Whether requests may go to it."""
        return not worker.unreachable and self._clock() - worker.heard <= LOST_AFTER

    def workers(self) -> list[KnownWorker]:
        """Those that are there."""
        return [worker for worker in self._workers.values() if self.is_there(worker)]

    def models(self) -> list[str]:
        """The models of the workers that are there, in order of their names."""
        return sorted({name for worker in self.workers() for name in worker.notice.models})

    def known(self) -> str:
        """Which models there are, in words."""
        return f"the workers have {', '.join(self.models()) or 'none'}"

    def having(self, model: str) -> list[KnownWorker]:
        """The workers of a model, lost ones among them. RequestRefused where there are none."""
        found = [worker for worker in self._workers.values() if model in worker.notice.models]
        if not found:
            raise unknown_model(model, self.known())
        return found

    def choose(self, model: str, tried: Collection[KnownWorker] = ()) -> KnownWorker | None:
        """The worker with the shortest queue for a model, measured by its capacity; None: all were tried.

        Raises:
            RequestRefused: no worker has that model, or those that had it are lost.
        """
        free = [worker for worker in self.having(model) if self.is_there(worker) and worker not in tried]
        if not free:
            if tried:
                return None
            raise no_worker(model)
        self._requests += 1
        chosen = min(free, key=lambda worker: (worker.in_flight / worker.notice.capacity, worker.taken))
        chosen.taken = self._requests
        return chosen


def no_worker(model: str) -> RequestRefused:
    """The refusal of a request whose workers are all lost."""
    return RequestRefused(
        f"no worker of the model {model[:200]!r} can be reached: ask again later",
        status=UNAVAILABLE,
        code="worker_lost",
        retry_after=int(HEARTBEAT_SECONDS),
    )
