"""A worker tells its controller that it is there."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import httpx

from mindspeed_mm.serving.worker_pool import HEARTBEAT_SECONDS

logger = logging.getLogger(__name__)


class WorkerHeartbeat:
    """Registers a worker and keeps it registered. A controller that is away, or started again, finds it again."""

    def __init__(
        self, controller: str, address: str, models: Sequence[str], capacity: int, token: str | None = None
    ) -> None:
        """`controller` and `address` as http://HOST:PORT; the rest as in WorkerNotice and ChatController."""
        self._controller = controller.rstrip("/")
        self._notice = {"address": address, "models": list(models), "capacity": capacity}
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._end = threading.Event()
        self._told: str | None = None

    def beat(self) -> bool:
        """Say it once. False where the controller cannot be reached or refuses; the log says so once."""
        return self._post("/workers")

    def run(self, alive: Callable[[], bool], ready: threading.Event) -> None:
        """Say it until `close`, once the server is `ready` and while it is `alive`; then say that the worker goes."""
        ready.wait()
        while not self._end.is_set():
            if alive():
                self.beat()
            self._end.wait(HEARTBEAT_SECONDS)
        self._post("/workers/leave")

    def close(self) -> None:
        """End `run`."""
        self._end.set()

    def _post(self, path: str) -> bool:
        try:
            response = httpx.post(
                self._controller + path, json=self._notice, headers=self._headers, timeout=5, trust_env=False
            )
            problem = None if response.is_success else f"{response.status_code} {response.text[:300]}"
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            problem = repr(error)
        if problem != self._told:
            if problem is None:
                logger.info("the controller at %s knows this worker", self._controller)
            else:
                logger.warning("the controller at %s does not take this worker: %s", self._controller, problem)
        self._told = problem
        return problem is None
